"""How threads of OpenMP wait for work: a moment awake, then asleep, so that a busy machine does not stand still."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 10_000  # of 300,000: some tens of µs, which is about as far as two operations of a model lie apart


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads fall asleep soon, unless the environment says otherwise; libgomp reads it once, as torch is imported.

    Where others keep the cores busy, threads that stay awake use up the turns of those that they wait for.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))
