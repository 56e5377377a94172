"""`cuda.bytes` of `fp8_chain`: the CUDA C++ kernel for Hopper where a linear widens, Triton's launches for all else.

Compiled, not run: no GPU has executed it yet, so it runs only where VITLR_BACKEND=cuda asks for it.
csrc/cuda/fp8_body.h is the design, docs/kernels/eight_bits.md the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vitlr.ops.backends import cuda, native, triton
from vitlr.ops.backends.triton import byte_chains
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers import fp8_chain

NAME = "fp8_linear_sm90"
ROWS, COLUMNS = 192, 128  # of a tile: csrc/cuda/fp8_tile.h
WIDEST = 768  # columns of x: a row block of it is held in shared memory
STEP = 16  # what K and N have to be multiples of, in bytes as TMA moves rows


def widens(K: int, N: int) -> bool:
    """Whether the kernel takes a linear of this chain: one that reads little and writes much."""
    return K < N and K <= WIDEST and K % STEP == 0 and N % STEP == 0


def objection(key: fp8_chain.Key) -> str | None:
    """Why the kernel does not take part in a call, in one line; None where it does."""
    if (key.M or 0) > cuda.MOST_ROWS:
        return f"M={key.M}, expected at most 2^30 rows"
    if not any(widens(K, N) for K, N in pairwise(key.widths[:-1])):
        return (
            f"widths {list(key.widths)}: no linear before the last widens from at most {WIDEST} columns, in "
            f"multiples of {STEP}"
        )
    return None


def _supports(key: fp8_chain.Key) -> str | None:
    return cuda.device_objection(key.device) or objection(key) or byte_chains.supports_fp8(key)


def floor(key: fp8_chain.Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor in µs: that of Triton's launches, and of the kernel products beside activations, no wave lost."""
    target = target or triton.target_of(key.device)
    last = len(key.acts) - 1
    total = byte_chains.floor(key, ceilings, target, leave=lambda i, K, N: i < last and widens(K, N))
    M = key.M or 0
    for (K, N), act in zip(pairwise(key.widths[:-1]), key.acts, strict=False):
        if total is not None and widens(K, N):
            tiles = -(-M // ROWS) * -(-N // COLUMNS)
            tile = ROWS * COLUMNS
            each = max(2 * tile * K, 2 * triton.issued(tile, act, target))
            moved = M * (K + N) + N * K
            step = floors.in_waves(each, tiles, cuda.PROCESSORS, moved, fp8_chain.FP8, ceilings)
            total = None if step is None else total + step
    return total


def run(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None],
    reaches: Sequence[Tensor], residual: Tensor | None, acts: Sequence[str], norm: Sequence[Tensor] = (),
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The arguments and the result of the op. Raises InputError for what the kernel refuses."""
    chains = triton.kernels("byte_chains")
    return chains.run_fp8(x, codes, scales, biases, reaches, residual, acts, norm, eps, to_fp8=to_fp8)


def to_fp8(
    rows: Any, W: Tensor, scale: Tensor, bias: Tensor | None, reach: Tensor, act: str, dtype: torch.dtype
) -> Any:
    """act(p) [M, N] in e4m3 with the scales and sums of squares of its rows, from rows and a linear W [N, K]."""
    linear = triton.kernels("byte_linear")
    (M, K), N = rows.q.shape, len(W)
    if not widens(K, N):
        return linear.to_fp8(rows, W, scale, bias, reach, act, dtype)
    y = W.new_empty((M, N))
    y_scale, y_squares = scale.new_empty((M,)), scale.new_empty((M, -(-N // COLUMNS)))
    native.cuda_call(
        NAME, rows.q.data_ptr(), W.data_ptr(), y.data_ptr(), M, K, N, cuda.ACTS.index(act), rows.squares.shape[1],
        rows.scale.data_ptr(), rows.squares.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        reach.data_ptr(), y_scale.data_ptr(), y_squares.data_ptr(), 0, device=W.device,
    )  # fmt: skip
    return linear.Rows(y, y_scale, y_squares)


registry.register(fp8_chain.OP, registry.Candidate("cuda.bytes", _supports, run, floor=floor))
