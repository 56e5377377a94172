"""What choices of tiles have in common: dtypes, exactness, ranks as powers of two, tiles that shrink until they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import triton

from .targets import Target, Unsupported

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What kernels of layers take, by the names that Triton gives them."""

Config = TypeVar("Config")
Steps = Sequence[tuple[str, int]]


def check_dtype(dtype: torch.dtype, target: Target, name: str = "x") -> None:
    """Raises Unsupported for a dtype that kernels of layers do not take."""
    if dtype not in DTYPES.values():
        raise Unsupported(f"{name} is {dtype}, taken are {', '.join(DTYPES)}")
    if dtype is torch.bfloat16 and target.backend == "interpreter":
        raise Unsupported(f"{name} is {dtype}, whose products are wrong in Triton's interpreter")


def check_sizes(**sizes: int) -> None:
    """Raises Unsupported for a size below 1."""
    if min(sizes.values()) < 1:
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise Unsupported(f"{told}, taken are sizes of at least 1")


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are taken: exactly, or as TF32 where the user lets torch's own matmul do so."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype is torch.float32 and allowed else "ieee"


def two_powers(r: int) -> tuple[int, int]:
    """The least `R1 + R2 >= r`: powers of two of at least 16, which a tensor core needs, R2 < R1 or R2 = 0."""
    whole = max(16, triton.next_power_of_2(r))
    rest = max(16, triton.next_power_of_2(r - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def smaller(config: Config, steps: Steps) -> Iterator[Config]:
    """A config and what it is cut down to, step by step: (field, its value from then on)."""
    yield config
    for name, least in steps:
        if getattr(config, name) > least:
            config = replace(config, **{name: least})  # type: ignore[type-var]
            yield config


def fitting(config: Config, steps: Steps, shared_memory: Callable[[Any], int], target: Target) -> Config:
    """The first of `smaller(config, steps)` that fits the shared memory. Raises Unsupported if none does."""
    for option in smaller(config, steps):
        if shared_memory(option) <= target.shared_memory:
            return option
    raise Unsupported(
        f"no tiles fit the {target.shared_memory} bytes of shared memory of {target.name}, "
        f"the smallest take {shared_memory(option)}"
    )
