"""What devices reach at best, and the time that no implementation of an op can beat under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best, as measured: bytes/s of memory and FLOP/s for each dtype."""

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[torch.dtype, float]

    def microseconds(self, flops: float, size: float, dtype: torch.dtype) -> float | None:
        """`max(flops / peak, bytes / bandwidth)` in µs; None where the dtype's peak is not known."""
        peak = self.flops_per_s.get(dtype)
        return None if peak is None else 1e6 * max(flops / peak, size / self.bytes_per_s)


def peaks(bf16: float) -> dict[torch.dtype, float]:
    """FLOP/s by dtype of a card whose bf16 products reach that: fp16 the same, bytes twice as many."""
    return {
        **dict.fromkeys((torch.bfloat16, torch.float16), bf16),
        **dict.fromkeys((torch.float8_e4m3fn, torch.int8), 2 * bf16),
    }


# Copy bandwidth and bf16 GEMM as measured on such cards.
H100 = Ceilings("NVIDIA H100 80GB HBM3", 3.0e12, peaks(798e12))
H200 = Ceilings("NVIDIA H200", 4.3e12, peaks(790e12))


def ceilings_of(device: torch.device | str) -> Ceilings | None:
    """The measured ceilings of a device, or None: no floor in µs is better than one from another machine."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_name(device)
    return next((limits for limits in (H100, H200) if limits.name in card), None)


@dataclass(frozen=True)
class Roofline:
    """FLOPs, compulsory bytes and the time in µs that no implementation can beat (None: ceilings not known)."""

    flops: int
    bytes: int
    floor_us: float | None

    @classmethod
    def of(cls, flops: int, size: int, dtype: torch.dtype, ceilings: Ceilings | None) -> Roofline:
        """Of FLOPs in a dtype and `size` bytes, under the ceilings of a device."""
        return cls(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))
