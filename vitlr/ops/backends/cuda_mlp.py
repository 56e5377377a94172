"""`cuda.mlp` of `fp8_chain`: its last three linears as one CUDA C++ kernel for Hopper, the hidden layer never written.

Compiled, not run: no GPU has executed it yet, so it runs only where VITLR_BACKEND=cuda asks for it.
csrc/cuda/fp8_mlp_body.h is the design, docs/kernels/eight_bits.md the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitlr.ops.backends import cuda, native, triton
from vitlr.ops.backends.triton import byte_chains
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers import fp8_chain

NAME = "fp8_mlp_sm90"
ROWS, SLICE = 128, 128  # of a unit of work: csrc/cuda/fp8_mlp_tile.h
RANKS = (192, 224, 256)  # that are compiled; sums of a row block are held in registers
STEP = 16  # what ranks and widths have to be multiples of
TAKEN = 3  # linears: rank to hidden, hidden to rank, rank to width


def objection(key: fp8_chain.Key) -> str | None:
    """Why the kernel does not take a call, in one line; None where it does."""
    if key.dtype not in cuda.DTYPES:
        return f"x is {key.dtype}, the kernel writes bfloat16 and float16"
    if (key.M or 0) > cuda.MOST_ROWS:
        return f"M={key.M}, expected at most 2^30 rows"
    if len(key.acts) < TAKEN or any(act != "none" for act in key.acts[1 - TAKEN :]):
        return f"acts {list(key.acts)}, expected at least {TAKEN} linears, the last two of them without activation"
    r1, D, r2, N = key.widths[-1 - TAKEN :]
    if max(r1, r2) > RANKS[-1]:
        return f"ranks {r1} and {r2}, expected at most {RANKS[-1]}: sums are held in registers"
    if any(size % STEP for size in (r1, D, r2, N)):
        return f"widths {[r1, D, r2, N]}, expected multiples of {STEP}"
    return None


def _supports(key: fp8_chain.Key) -> str | None:
    return cuda.device_objection(key.device) or objection(key) or byte_chains.supports_fp8(key)


def floor(key: fp8_chain.Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor in µs: that of Triton's launches before it, and of the kernel, its units shared evenly."""
    target = target or triton.target_of(key.device)
    M, (r1, D, r2, N) = key.M or 0, key.widths[-1 - TAKEN :]
    first = len(key.acts) - TAKEN
    before = byte_chains.floor(key, ceilings, target, leave=lambda i, K, N: i >= first)
    blocks = -(-M // ROWS)
    R = next(R for R in RANKS if max(r1, r2) <= R)
    tile = ROWS * SLICE
    each = max(4 * tile * R, 2 * triton.issued(tile, key.acts[-TAKEN], target))
    moved = M * (r1 + key.dtype.itemsize * N * (1 + key.residual)) + r1 * D + D * r2 + r2 * N
    slices = floors.in_waves(each, blocks * -(-D // SLICE), cuda.PROCESSORS, moved, fp8_chain.FP8, ceilings)
    last = floors.in_waves(2 * ROWS * N * R, blocks, cuda.PROCESSORS, 0, fp8_chain.FP8, ceilings)
    return None if before is None or slices is None or last is None else before + slices + last


def run(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None],
    reaches: Sequence[Tensor], residual: Tensor | None, acts: Sequence[str], norm: Sequence[Tensor] = (),
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The arguments and the result of the op. Raises InputError for what the kernel refuses."""
    chains, M = triton.kernels("byte_chains"), math.prod(x.shape[:-1])
    first = len(codes) - TAKEN
    y = x.new_empty((*x.shape[:-1], len(codes[-1])))
    if M == 0:
        return y
    every = [(W.contiguous(), scale.contiguous(), None if b is None else b.contiguous())
             for W, scale, b in zip(codes, scales, biases, strict=True)]  # fmt: skip
    rows = chains.rows_fp8(x, every[:first], reaches, acts, norm, eps)
    added = None if residual is None else residual.reshape(M, -1).contiguous()
    _launch(rows, every[first:], reaches[first].contiguous(), acts[first], added, y)
    return y


def _launch(
    rows: Any, steps: Sequence[tuple[Tensor, Tensor, Tensor | None]], reach: Tensor, act: str, residual: Tensor | None,
    y: Tensor,
) -> None:  # fmt: skip
    (M, r1), (D, r2, N), device = rows.q.shape, (len(W) for W, _, _ in steps), rows.q.device
    sizes = M, r1, D, r2, N
    ctas, each = native.cuda().fp8_mlp_sm90_room(*sizes, 0, native.device_index(device))
    sums = reach.new_empty((ctas, each))
    flags = torch.zeros((ctas, 2), dtype=torch.int32, device=device)
    vectors = [0 if t is None else t.data_ptr() for _, scale, bias in steps for t in (scale, bias)]
    native.cuda_call(
        NAME, rows.q.data_ptr(), *(W.data_ptr() for W, _, _ in steps), y.data_ptr(), *sizes, cuda.ACTS.index(act),
        y.dtype == torch.float16, rows.squares.shape[1], rows.scale.data_ptr(), rows.squares.data_ptr(),
        reach.data_ptr(), *vectors, 0 if residual is None else residual.data_ptr(), sums.data_ptr(), flags.data_ptr(),
        0, device=device,
    )  # fmt: skip


registry.register(fp8_chain.OP, registry.Candidate("cuda.mlp", _supports, run, floor=floor))
