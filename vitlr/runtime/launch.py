"""What a launcher such as torchrun says in the environment; imports no torch, so that the shell can ask at once."""

from __future__ import annotations

import os
import sys

LOCAL_RANK = "LOCAL_RANK"


def launched() -> bool:
    """Whether a launcher started several processes of this run."""
    return "RANK" in os.environ and _number("WORLD_SIZE", 1) > 1


def launched_first() -> bool:
    """Whether this is process 0 of them, or the only one."""
    return not launched() or _number("RANK", 0) == 0


def silence() -> None:
    """Let this process say nothing, on no stream: process 0 speaks for all."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def _number(name: str, otherwise: int) -> int:
    said = os.environ.get(name, "")
    return int(said) if said.isdigit() else otherwise
