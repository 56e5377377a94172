"""Triton's candidates of `lowrank_residual_linear`: T in a launch of its own, or again in every tile along N."""

from __future__ import annotations

from typing import Any

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers.lowrank_residual_linear import OP, Key, roofline

CONFIG = "lowrank_residual_config"  # the module of its tiles
_LAUNCH = 2e9  # FLOPs that a GPU of the H200's class does while a launch gets going


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.form, key.group_size, key.dtype


def _kernel_floor(variant: str) -> Any:
    """The floor of a variant in µs: its own FLOPs on whole waves of tiles or the compulsory bytes, and T's launch."""

    def floor(key: Key, ceilings: registry.Ceilings) -> float | None:
        kernels, (rows, K, N, r, form, group_size, dtype) = triton.kernels(CONFIG), _sizes(key)
        M, fused, target = rows or 1, variant == "one_pass", triton.target_of(key.device)
        config = getattr(kernels, variant)(*_sizes(key), target)
        tiles = kernels.tiles(M, K, N, form, group_size, config)
        each = kernels.flops(M, K, N, r, form, group_size, config, fused) / tiles
        size = roofline(key._replace(M=M)).bytes
        main = floors.in_waves(each, tiles, target.sms, size, dtype, ceilings)
        shrink = 0.0 if fused else ceilings.microseconds(2 * M * r * K, dtype.itemsize * (M * (K + r) + r * K), dtype)
        return None if main is None or shrink is None else main + shrink

    return floor


def _one_pass_pays(key: Key) -> str | None:
    """Every tile along N computes T again: it has to cost less than the launch that computes it once."""
    kernels = triton.kernels(CONFIG)
    config = kernels.one_pass(*_sizes(key), triton.target_of(key.device))
    given = (key.M or 1, key.K, key.N, key.r, key.form, key.group_size, config)
    again = kernels.flops(*given, True) - kernels.flops(*given, False) - 2 * (key.M or 1) * key.r * key.K
    return f"T again for every tile along N: {again / 1e9:.1f} GFLOP" if again > _LAUNCH else None


def _candidate(variant: str, **more: Any) -> registry.Candidate:
    return triton.candidate(variant, OP, variant, _sizes, f"run_{variant}", floor=_kernel_floor(variant), **more)


registry.register(OP, _candidate("two_pass"))
registry.register(OP, _candidate("one_pass", worth=_one_pass_pays))  # the last one is asked first
