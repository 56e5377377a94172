"""What the tests of all Triton kernels share: where they run, in which dtypes, and how an unwritten element shows.

The same tests run on a GPU and, without one, in Triton's interpreter (`tests/conftest.py` sets TRITON_INTERPRET).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

# The interpreter's bf16 dot is wrong; a GPU's is not.
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available()]

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("triton") is None else []


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that a kernel can be tested in here, one after the other."""
    return request.param


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch takes the Triton candidate of every op, or says why it cannot."""
    monkeypatch.setenv("VITLR_BACKEND", "triton")


class _PoisonedTorch:
    """torch, but memory that nobody has written yet holds NaN (integers: their largest value)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(torch.empty_like(*args, **kwargs))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    floating = tensor.is_floating_point()
    return tensor.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """A function that poisons what a kernel module gets from torch.empty: `poison(lowrank_linear)`.

    Scratch memory and output that a kernel reads or returns without having written them then show as NaN.
    """

    def patch(module: ModuleType) -> None:
        monkeypatch.setattr(module, "torch", _PoisonedTorch())

    return patch
