"""What MLPs in bytes should take on a GPU, launch by launch, beside their rivals: floors and predictions, in µs.

    python -m bench.micro.byte_chains [--rows 12608]

Anywhere: nothing is run. A floor is the longest of bytes, products and activations, in whole waves. A prediction has
products at 0.7 of the peak, tiles read from L2 at 6.5 TB/s, activations beside them only where two programs share a
processor, and 2 µs for the ends of a launch.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise

import torch

from vitlr.ops.backends import cuda_bytes, cuda_mlp
from vitlr.ops.dispatch.ceilings import H100, H200, Ceilings
from vitlr.ops.layers.fp8_chain import FP8, Key, roofline
from vitlr.triton_kernels import byte_linear
from vitlr.triton_kernels.activations import issue_flops
from vitlr.triton_kernels.targets import TARGETS

SM90 = TARGETS["sm_90"]
PEAK, L2, ENDS = 0.7, 6.5e12, 2.0
SLOTS, CLOCKS = 12.2, 1755  # issued an element of cuda.bytes with GELU, counted in its SASS; clocks a µs
UNWRITTEN_SLOTS, MEMSET = 10.5, 1.5  # the same of cuda.mlp; µs of the memset of its flags
FORMS = {"r = 224": (224, 3072, 224), "r = 384": (384, 3072, 384), "dense": (3072,), "1920 channels": (1920,)}


def launches(M: int, widths: tuple[int, ...], act_at: int, limits: Ceilings) -> list[tuple[str, float, float]]:
    """(what, floor, prediction) of every launch, without norm and residual sum."""
    K = widths[0]
    rows = 1e6 * M * K * 3 / limits.bytes_per_s
    found = [("rows to bytes", rows, rows + ENDS)]
    for i, (k, n) in enumerate(pairwise(widths)):
        config = byte_linear.config(M, k, n, torch.bfloat16, FP8, SM90)
        tiles, tile = byte_linear.tiles(M, n, config), config.BM * config.BN
        waves = -(-tiles // SM90.sms) * SM90.sms
        peak = limits.flops_per_s[FP8]
        moved = 1e6 * (M * k + n * k + M * n * (2 if i == len(widths) - 2 else 1)) / limits.bytes_per_s
        issue = 1e6 * 2 * waves * issue_flops(tile, "gelu", SM90) / peak if i == act_at else 0.0
        products = 1e6 * 2 * waves * tile * k / peak
        read = 1e6 * (tiles * (config.BM + config.BN) * k + M * n) / L2
        slower = max(products / PEAK, moved, read)
        slower = slower + issue if config.BN > 128 else max(slower, issue)
        found.append((f"{k} to {n}", max(products, moved, issue), slower + ENDS))
    return found


def widening(M: int, K: int, N: int, limits: Ceilings) -> tuple[float, float]:
    """The floor and the prediction of `cuda.bytes`: tiles shared evenly, W read from L2 once a row block of 192."""
    blocks, across = -(-M // cuda_bytes.ROWS), -(-N // cuda_bytes.COLUMNS)
    tiles = -(-blocks * across // SM90.sms)
    depth = -(-K // 32) * 32 if K <= 384 else -(-K // 128) * 128
    tile = cuda_bytes.ROWS * cuda_bytes.COLUMNS
    products = 1e6 * tiles * SM90.sms * 2 * tile * depth / limits.flops_per_s[FP8]
    issued = tiles * tile * SLOTS / 128 / CLOCKS
    read = 1e6 * (blocks * N * K + (blocks + SM90.sms) * cuda_bytes.ROWS * K + M * N) / L2
    moved = 1e6 * (M * K + N * K + M * N) / limits.bytes_per_s
    return max(products, issued, moved), max(products / PEAK, issued, read, moved) + ENDS


def unwritten(M: int, r: int, D: int, N: int, limits: Ceilings) -> tuple[float, float]:
    """The floor and the prediction of `cuda.mlp` behind its first linear: units shared evenly, then the last linear."""
    blocks, R = -(-M // cuda_mlp.ROWS), next(R for R in cuda_mlp.RANKS if r <= R)
    units = -(-blocks * -(-D // cuda_mlp.SLICE) // SM90.sms)
    tile, peak = cuda_mlp.ROWS * cuda_mlp.SLICE, limits.flops_per_s[FP8] / SM90.sms
    products, last = (1e6 * flops / peak for flops in (units * 4 * tile * R, 2 * cuda_mlp.ROWS * N * R))
    issued = units * tile * UNWRITTEN_SLOTS / 128 / CLOCKS
    read, written = 1e6 * blocks * 2 * D * R / L2, 1e6 * 2 * M * N / limits.bytes_per_s
    left = 1e6 * 2 * 4 * SM90.sms * cuda_mlp.ROWS * R / L2
    floor = max(products, issued) + max(last, written)
    return floor, max(products / PEAK, issued, read) + max(last / PEAK, written) + left + ENDS


def bf16(M: int, products: list[tuple[int, int]], limits: Ceilings) -> float:
    """The floor of products in bf16, a GELU in one's epilogue."""
    steps = [(2 * M * k * n, 2 * (M * (k + n) + k * n)) for k, n in products]
    return sum(limits.microseconds(flops, size, torch.bfloat16) or 0.0 for flops, size in steps)


def fp8_compiled(M: int, D: int, limits: Ceilings) -> float:
    """The floor of a dense MLP by torch._scaled_mm: products in bf16 out, and passes that round rows, GELU in one."""
    steps = [(2 * M * k * n, M * (k + 2 * n) + k * n) for k, n in ((768, D), (D, 768))]
    passes = 1e6 * 3 * M * (768 + D) / limits.bytes_per_s
    return passes + sum(limits.microseconds(flops, size, FP8) or 0.0 for flops, size in steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12608, help="images times tokens")
    M = parser.parse_args().rows
    print("| MLP of ViT-B | card | roofline | floor | predicted | bf16 products | dense bf16 | dense fp8, compiled |")
    print("|---|---|---|---|---|---|---|---|")
    for name, hidden in FORMS.items():
        widths, act_at = (768, *hidden, 768), len(hidden) // 2
        for card, limits in (("H100", H100), ("H200", H200)):
            every = launches(M, widths, act_at, limits)
            key = Key(M, widths, ("none",) * (len(widths) - 1), False, torch.bfloat16)
            cells = [
                roofline(key, limits).floor_us or 0.0,
                sum(floor for _, floor, _ in every),
                sum(predicted for _, _, predicted in every),
                bf16(M, list(pairwise(widths)), limits),
                bf16(M, [(768, 3072), (3072, 768)], limits),
                fp8_compiled(M, 3072, limits),
            ]
            print(f"| {name} | {card} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    print("\n| launch, r = 224 on an H100 | floor | predicted |\n|---|---|---|")
    for what, floor, predicted in launches(M, (768, *FORMS["r = 224"], 768), 1, H100):
        print(f"| {what} | {floor:.1f} | {predicted:.1f} |")
    print("\n| with GELU to bytes | card | Triton, predicted | cuda.bytes, floor | predicted |\n|---|---|---|---|---|")
    for K in (224, 384, 768):
        for card, limits in (("H100", H100), ("H200", H200)):
            at = 1 if K == 768 else 2
            _, _, theirs = launches(M, (768, *(K,) * (at - 1), 3072, 768), at - 1, limits)[at]
            floor, predicted = widening(M, K, 3072, limits)
            print(f"| {K} to 3072 | {card} | {theirs:.1f} | {floor:.1f} | {predicted:.1f} |")
    print(
        "\n| r | card | cuda.mlp, floor | predicted | the MLP, predicted | by cuda.bytes |\n|---|---|---|---|---|---|"
    )
    for r in cuda_mlp.RANKS:
        for card, limits in (("H100", H100), ("H200", H200)):
            every = [predicted for _, _, predicted in launches(M, (768, r, 3072, r, 768), 1, limits)]
            floor, predicted = unwritten(M, r, 3072, 768, limits)
            bytes_ = every[0] + every[1] + widening(M, r, 3072, limits)[1] + every[3] + every[4]
            whole = every[0] + every[1] + predicted + MEMSET
            print(f"| {r} | {card} | {floor:.1f} | {predicted:.1f} | {whole:.0f} | {bytes_:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
