"""The Triton kernels as candidates. Triton is imported when one is to run on a GPU, never by `import vitlr`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from vitlr.errors import InputError
from vitlr.ops.dispatch.ceilings import Ceilings
from vitlr.ops.dispatch.registry import Candidate


def kernels(module: str) -> Any:
    """The module `vitlr.triton_kernels.<module>`. Raises InputError where Triton is missing."""
    try:
        return importlib.import_module(f"vitlr.triton_kernels.{module}")
    except ImportError as cause:
        raise InputError(f"the Triton kernels do not import: {cause}") from cause


def config(module: str, variant: str, device: torch.device, *sizes: Any) -> Any:
    """The tiles with which a variant runs on a device. Raises InputError with the reason where it does not."""
    targets = kernels("targets")
    if device.type != "cuda" and not targets.interpreting():
        raise InputError(f"x is on {device}, Triton kernels run on a GPU")
    if importlib.util.find_spec("triton") is None:
        raise InputError("triton is not installed")
    try:
        return getattr(kernels(module), variant)(*sizes, target_of(device))
    except targets.Unsupported as cause:
        raise InputError(str(cause)) from cause


def target_of(device: torch.device) -> Any:
    """What the kernels know of a device: its processors, and what its tiles may take."""
    return kernels("targets").target_of(device)


def issued(elements: int, act: str, target: Any) -> float:
    """FLOPs that take as long as a program's activations: products and activations may at best overlap."""
    return kernels("activations").issue_flops(elements, act, target)


def candidate(
    name: str,
    module: str,
    variant: str,
    sizes: Callable[[Any], tuple],
    run: str,
    *,
    ran_on: tuple[str, ...] = (),
    worth: Callable[[Any], str | None] = lambda key: None,
    floor: Callable[[Any, Ceilings], float | None] | None = None,
) -> Candidate:
    """The candidate `triton.<name>`: `module.variant(*sizes(key), target)` is its config, `module.run` runs it."""

    def supports(key: Any) -> str | None:
        try:
            config(module, variant, key.device, *sizes(key))
        except InputError as cause:
            return str(cause)
        return None

    def launch(*args: Any) -> torch.Tensor:
        return getattr(kernels(module), run)(*args)

    return Candidate(f"triton.{name}", supports, launch, ran_on, worth, floor)
