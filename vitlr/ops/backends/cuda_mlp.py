"""`cuda.mlp` of `fp8_chain`: its last three linears as one CUDA C++ kernel for Hopper, the hidden layer never written.

A single linear before them and the rounding of x are a second kernel, where x is narrow enough; else Triton's launches.
Compiled, not run: no GPU has executed either yet, so they run only where VITLR_BACKEND=cuda asks for them.
csrc/cuda/fp8_mlp_body.h and fp8_first_body.h are the design, docs/kernels/eight_bits.md the prediction.
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

NAME, FIRST = "fp8_mlp_sm90", "fp8_first_sm90"
ROWS, SLICE = 128, 128  # of a unit of work: csrc/cuda/fp8_mlp_tile.h
RANKS = (192, 224, 256)  # that are compiled; sums of a row block are held in registers
ALIGNMENT = 16  # bytes, of floats that are loaded eight at a time
STEP = 16  # what ranks and widths have to be multiples of
TAKEN = 3  # linears: rank to hidden, hidden to rank, rank to width
WIDEST = 768  # columns of x for the kernel of rows and first linear, which holds all of W: csrc/cuda/fp8_first_tile.h
GROUPS = {224: 32, 256: 16}  # its rows at a time, by rank


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
    if joins(key.widths, key.acts):
        K, group = key.widths[0], GROUPS[next(R for R in GROUPS if r1 <= R)]
        moved = M * (key.dtype.itemsize * K + r1) + r1 * K
        before = floors.in_waves(2 * group * r1 * K, -(-M // group), cuda.PROCESSORS, moved, fp8_chain.FP8, ceilings)
    else:
        before = byte_chains.floor(key, ceilings, target, leave=lambda i, K, N: i >= first)
    blocks = -(-M // ROWS)
    R = next(R for R in RANKS if max(r1, r2) <= R)
    tile = ROWS * SLICE
    each = max(4 * tile * R, 2 * triton.issued(tile, key.acts[-TAKEN], target))
    moved = M * (r1 + key.dtype.itemsize * N * (1 + key.residual)) + r1 * D + D * r2 + r2 * N
    slices = floors.in_waves(each, blocks * -(-D // SLICE), cuda.PROCESSORS, moved, fp8_chain.FP8, ceilings)
    last = floors.in_waves(2 * ROWS * N * R, blocks, cuda.PROCESSORS, 0, fp8_chain.FP8, ceilings)
    return None if before is None or slices is None or last is None else before + slices + last


def joins(widths: Sequence[int], acts: Sequence[str]) -> bool:
    """Whether rows and the linear before the last three are one launch."""
    K, r = widths[:2]
    fits = K <= WIDEST and K % STEP == 0 and r <= RANKS[-1] and r % STEP == 0
    return len(acts) == TAKEN + 1 and acts[0] == "none" and fits


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
    sizes = M, codes[first].shape[1], *(len(W) for W in codes[first:])
    ctas, each = native.cuda().fp8_mlp_sm90_room(*sizes, 0, native.device_index(x.device))
    sums, flags = reaches[0].new_empty((ctas, each)), torch.empty((ctas, 2), dtype=torch.int32, device=x.device)
    floats = [t.contiguous() for t in (x, *norm)] if joins([x.shape[-1], sizes[1]], acts) else []
    if floats and all(t.data_ptr() % ALIGNMENT == 0 for t in floats):
        rows = _first(floats[0].view(M, -1), every[0], reaches[0].contiguous(), floats[1:], eps, flags)
    else:
        rows = chains.rows_fp8(x, every[:first], reaches, acts, norm, eps)
        flags.zero_()
    added = None if residual is None else residual.reshape(M, -1).contiguous()
    _launch(rows, every[first:], reaches[first].contiguous(), acts[first], added, y, sums, flags)
    return y


def _first(
    x: Tensor, step: tuple[Tensor, Tensor, Tensor | None], reach: Tensor, norm: Sequence[Tensor], eps: float,
    flags: Tensor,
) -> Any:  # fmt: skip
    """Rows of the first linear in bytes, from x [M, K] or its norm; flags become zero on the way."""
    (W, scale, bias), M = step, len(x)
    made = W.new_empty((M, len(W))), scale.new_empty((M,)), scale.new_empty((M, 1))
    rows = triton.kernels("byte_linear").Rows(*made)
    gamma, beta = (t.data_ptr() for t in norm) if norm else (0, 0)
    native.cuda_call(
        FIRST, W.data_ptr(), rows.q.data_ptr(), M, W.shape[1], len(W), x.dtype == torch.float16, x.data_ptr(), gamma,
        beta, eps, scale.data_ptr(), 0 if bias is None else bias.data_ptr(), reach.data_ptr(), rows.scale.data_ptr(),
        rows.squares.data_ptr(), flags.data_ptr(), flags.numel(), 0, device=x.device,
    )  # fmt: skip
    return rows


def _launch(
    rows: Any, steps: Sequence[tuple[Tensor, Tensor, Tensor | None]], reach: Tensor, act: str, residual: Tensor | None,
    y: Tensor, sums: Tensor, flags: Tensor,
) -> None:  # fmt: skip
    sizes = *rows.q.shape, *(len(W) for W, _, _ in steps)
    vectors = [0 if t is None else t.data_ptr() for _, scale, bias in steps for t in (scale, bias)]
    native.cuda_call(
        NAME, rows.q.data_ptr(), *(W.data_ptr() for W, _, _ in steps), y.data_ptr(), *sizes, cuda.ACTS.index(act),
        y.dtype == torch.float16, rows.squares.shape[1], rows.scale.data_ptr(), rows.squares.data_ptr(),
        reach.data_ptr(), *vectors, 0 if residual is None else residual.data_ptr(), sums.data_ptr(), flags.data_ptr(),
        0, device=rows.q.device,
    )  # fmt: skip


registry.register(fp8_chain.OP, registry.Candidate("cuda.mlp", _supports, run, floor=floor))
