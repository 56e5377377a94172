"""What a GPU offers a kernel, by architecture: known without a GPU, so that plans and tests need none."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


class Unsupported(ValueError):
    """A shape, dtype or architecture that a kernel does not take; the message says which and what it does take."""


@dataclass(frozen=True)
class Target:
    """An architecture: `arch` as Triton's compiler names it, bytes of shared memory a block may use, processors."""

    name: str
    backend: str
    arch: int | str
    shared_memory: int
    sms: int

    @property
    def hopper(self) -> bool:
        """Whether matrices are multiplied by warp groups of four warps (wgmma)."""
        return self.name == "sm_90"


# Shared memory a block can opt in to; CUDA programming guide, "Compute capabilities".
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 163 * 1024, 108),
        Target("sm_86", "cuda", 86, 99 * 1024, 84),
        Target("sm_89", "cuda", 89, 99 * 1024, 128),
        Target("sm_90", "cuda", 90, 227 * 1024, 132),
        Target("sm_100", "cuda", 100, 227 * 1024, 148),
        Target("sm_120", "cuda", 120, 99 * 1024, 170),
    )
}
INTERPRETER = Target("interpreter", "interpreter", 0, 227 * 1024, 132)
"""Triton's interpreter, which runs the kernels' Python on a CPU: for tests only."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def target_of(device: torch.device) -> Target:
    """The target of a device. Raises Unsupported where no kernel was ever compiled for it."""
    if interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise Unsupported(f"x is on {device}, Triton kernels run on a GPU")
    if not torch.cuda.is_available():
        raise Unsupported("torch sees no GPU")
    return _card(torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index))


_cards: dict[torch.device, Target] = {}


def _card(device: torch.device) -> Target:
    if device not in _cards:
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:  # whose numbers are others'
            raise Unsupported(f"{properties.name} is no NVIDIA GPU, the kernels are made for {', '.join(TARGETS)}")
        name = f"sm_{properties.major}{properties.minor}"
        known = TARGETS.get(name)
        if known is None:
            raise Unsupported(f"{properties.name} is {name}, the kernels are made for {', '.join(TARGETS)}")
        shared = getattr(properties, "shared_memory_per_block_optin", known.shared_memory)
        _cards[device] = Target(name, known.backend, known.arch, shared, properties.multi_processor_count)
    return _cards[device]
