"""Native kernels on each instruction set in turn: those that this CPU does not have are skipped."""

from __future__ import annotations

import pytest

from vitlr.errors import InputError
from vitlr.ops.backends import native


def forced(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """The instruction set that kernels run on until the end of the test."""
    monkeypatch.setenv("VITLR_CPU_ISA", name)
    try:
        assert native.isa_used() == name
    except InputError as reason:
        pytest.skip(str(reason))
    return name
