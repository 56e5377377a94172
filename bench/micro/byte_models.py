"""What ViT-B should gain from plans in 8-bit floats on a GPU: predicted times of its blocks beside those of its rivals.

    python -m bench.micro.byte_models

Anywhere: nothing is run. Our launches by the predictions of bench.micro.byte_chains, rivals by their floors: products
at the card's rate, norms, residual sums and rounding as passes that torch.compile fuses. Attention is the same for all:
its bytes, or its products at half the rate.
"""

from __future__ import annotations

import sys

import torch

from bench.micro.byte_chains import MEMSET, bf16, launches, unwritten, widening
from vitlr.ops.dispatch.ceilings import H100, H200, Ceilings
from vitlr.ops.layers.fp8_chain import FP8

D, HIDDEN, TOKENS, BLOCKS = 768, 3072, 197, 12
LOW, RANK = 3, 224  # qkv of a joint plan that are low-rank, as bench.gate.models has them
WIDTHS = {"joint params:80%": 2304, "joint params:60%": 1360}  # hidden channels that are left
UNIFORM = "params:40%"  # MLPs of rank 224; attention dense here


def attention(M: int, limits: Ceilings) -> float:
    """Softmax attention: qkv read, y written."""
    products = 1e6 * 4 * M * TOKENS * D / limits.flops_per_s[torch.bfloat16] / 0.5
    return max(products, 1e6 * 8 * M * D / limits.bytes_per_s)


def passes(M: int, size: float, limits: Ceilings) -> float:
    """Elementwise work that moves so many bytes an entry of [M, 768]."""
    return 1e6 * M * D * size / limits.bytes_per_s


def dense_bf16(M: int, limits: Ceilings) -> float:
    """A dense block, compiled: GELU in the epilogue, each residual sum in one pass with the norm behind it."""
    products = bf16(M, [(D, 3 * D), (D, D), (D, HIDDEN), (HIDDEN, D)], limits)
    return products + attention(M, limits) + 2 * passes(M, 2 * 4, limits)


def dense_fp8(M: int, limits: Ceilings) -> float:
    """The same by torch._scaled_mm, whose rows are rounded in the norm's pass, after attention and after GELU."""
    shapes = ((D, 3 * D), (D, D), (D, HIDDEN), (HIDDEN, D))
    products = sum(limits.microseconds(2 * M * k * n, M * (k + 2 * n) + k * n, FP8) or 0.0 for k, n in shapes)
    rounding = passes(M, 2 * (2 * 3 + 1) + 3, limits) + 1e6 * 3 * M * HIDDEN / limits.bytes_per_s
    return products + attention(M, limits) + rounding


def chain(M: int, widths: tuple[int, ...], limits: Ceilings, act_at: int = -1, residual: bool = False) -> float:
    """Our launches for linears in a row, norm included, where the last one may add a residual."""
    total = sum(predicted for _, _, predicted in launches(M, widths, act_at, limits))
    if act_at >= 0 and widths[act_at] < widths[act_at + 1]:
        total += (
            widening(M, *widths[act_at : act_at + 2], limits)[1] - launches(M, widths, act_at, limits)[1 + act_at][2]
        )
    return total + residual * passes(M, 2, limits)


def ours(M: int, plan: str, limits: Ceilings) -> float:
    """A block of a plan in 8-bit floats, the mean of twelve."""
    qkv, low = chain(M, (D, 3 * D), limits), chain(M, (D, RANK, 3 * D), limits)
    share = 0 if plan == UNIFORM else LOW / BLOCKS
    before = (1 - share) * qkv + share * low + attention(M, limits) + chain(M, (D, D), limits, residual=True)
    if plan == UNIFORM:
        first = sum(predicted for _, _, predicted in launches(M, (D, RANK, D), -1, limits)[:2])
        return before + first + unwritten(M, RANK, HIDDEN, D, limits)[1] + MEMSET + passes(M, 2, limits)
    return before + chain(M, (D, WIDTHS[plan], D), limits, act_at=0, residual=True)


def main() -> int:
    print("| plan | card | batch | ours | dense bf16 | dense fp8 | over bf16 | over fp8 |")
    print("|---|---|---|---|---|---|---|---|")
    for plan in (*WIDTHS, UNIFORM):
        for card, limits in (("H100", H100), ("H200", H200)):
            for batch in (64, 256):
                M = batch * TOKENS
                us, bf, fp8 = ours(M, plan, limits), dense_bf16(M, limits), dense_fp8(M, limits)
                cells = f"{us:.0f} | {bf:.0f} | {fp8:.0f} | {bf / us:.2f}x | {fp8 / us:.2f}x"
                print(f"| {plan} | {card} | {batch} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
