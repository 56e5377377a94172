"""The CUDA C++ kernels for Hopper as candidates: `cuda.sm90` of lowrank_mlp, `cuda.cluster` of lowrank_linear.

Compiled, not run: no GPU has executed them yet, so they run only where VITLR_BACKEND=cuda asks for them.
csrc/cuda/lowrank_body.h is the design, docs/kernels/lowrank_mlp.md the floor and the prediction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitlr.ops.backends import native, triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers import lowrank_linear, lowrank_mlp

DTYPES = (torch.bfloat16, torch.float16)
ACTS = ("none", "gelu", "gelu_tanh", "silu", "sigmoid", "relu")  # the order of csrc/cuda/activations.h
LARGEST_RANK = 256
MOST_ROWS = 2**30  # coordinates of TMA and row blocks are counted in 32 bits
PROCESSORS = 132  # of an H100 or H200
KERNELS = ("lowrank_sm90", "fp8_linear_sm90", "fp8_mlp_sm90")  # of vitlr._cuda, that only sm_90a has
Plan = tuple[int, int, int, int, int]


def device_objection(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in one line; None where they can."""
    reason = native.cuda_why_not(device)
    if reason is not None:
        return reason
    found = native.capability(device)
    if found != 90:
        return f"{device} has compute capability {found / 10}, the kernels use instructions that only 9.0 has"
    if missing := [name for name in KERNELS if not hasattr(native.cuda(), name)]:
        return (
            f"vitlr._cuda has no {missing[0]}: it was built without sm_90a, or from older sources; rebuild with "
            "TORCH_CUDA_ARCH_LIST=9.0a"
        )
    return None


def shape_objection(key: Any) -> str | None:
    """Why the kernels do not take a call of lowrank_mlp or lowrank_linear, in one line; None where they do."""
    if key.dtype not in DTYPES:
        return f"x is {key.dtype}, the kernels multiply bfloat16 and float16"
    for name, value in _inner_sizes(key).items():
        if value is None:
            return f"{'fc1' if name == 'r1' else 'fc2'} is dense, the kernel takes two low-rank linears"
        if value < 8 or value % 8:
            return f"{name}={value}, TMA moves rows of a multiple of 16 bytes: expected a multiple of 8"
        if name.startswith("r") and value > LARGEST_RANK:
            return f"{name}={value}, sums are held in registers: expected at most {LARGEST_RANK}"
    if (key.M or 0) > MOST_ROWS:
        return f"M={key.M}, expected at most 2^30 rows"
    return None


def _inner_sizes(key: Any) -> dict[str, int | None]:
    names = ("r1", "r2", "K", "D", "N") if isinstance(key, lowrank_mlp.Key) else ("r", "K", "N")
    return {name: getattr(key, name) for name in names}


def _supports(key: Any) -> str | None:
    return device_objection(key.device) or shape_objection(key)


def floor(key: Any, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs by the tiles that the kernel plans: whole waves of CTAs, each with its share of a row block.

    Every CTA of a cluster computes T of the MLP, of hidden tiles and of output each takes its share; activations are
    issued beside the products. Exchanges, latencies and launches are not counted.
    """
    mlp = isinstance(key, lowrank_mlp.Key)
    M = key.M or 0
    r1, r2, D = (key.r1, key.r2, key.D) if mlp else (key.r, key.r, 0)
    plan = native.cuda().lowrank_sm90_plan(M, key.K, D, key.N, r1, r2, key.residual, native.device_index(key.device))
    return planned_floor(key, plan, ceilings)


def planned_floor(key: Any, plan: tuple, ceilings: registry.Ceilings) -> float | None:
    """`floor` of a plan (R, warpgroups, ranks, clusters, groups, modelled µs)."""
    mlp = isinstance(key, lowrank_mlp.Key)
    _, warpgroups, ranks, _, groups, _ = plan
    rows, M = 64 * warpgroups, key.M or 0
    r1, r2, D = (key.r1, key.r2, key.D) if mlp else (key.r, key.r, 0)
    products = 2 * rows * (r1 * key.K / (1 if mlp else ranks) + (r1 + r2) * D / ranks + r2 * key.N / (ranks * groups))
    activated = D / ranks if mlp else key.N / (ranks * groups)
    issued = triton.kernels("activations").issue_flops(1, key.act, triton.kernels("targets").TARGETS["sm_90"])
    whole = lowrank_mlp.roofline(key) if mlp else lowrank_linear.roofline(key)
    each = max(products, rows * activated * issued)
    programs = math.ceil(M / rows) * groups * ranks
    return floors.in_waves(each, programs, PROCESSORS, whole.bytes, key.dtype, ceilings)


def run_mlp(
    x: Tensor,
    B1: Tensor,
    A1: Tensor,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
    plan: Plan | None = None,
) -> Tensor:
    """y [..., N] of the arguments of lowrank_mlp, one launch. Raises InputError for what the kernel refuses.

    `plan` forces (R, warpgroups, CTAs a cluster, clusters, clusters a row block), to bisect a fault and to tune.
    """
    return _run(x, B1, A1, b1, B2, A2, b2, residual, act, plan)


def run_linear(
    x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, plan: Plan | None = None
) -> Tensor:
    """y [..., N] of the arguments of lowrank_linear, one launch; `plan` and InputError as in `run_mlp`."""
    return _run(x, B, None, None, None, A, bias, residual, act, plan)


def _run(
    x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Any, A2: Tensor, b2: Any, residual: Any, act: str, plan: Plan | None
) -> Tensor:
    K, N, r1, r2 = x.shape[-1], A2.shape[0], B1.shape[0], A2.shape[1]
    M, D = math.prod(x.shape[:-1]), 0 if A1 is None else A1.shape[0]
    y = x.new_empty((*x.shape[:-1], N))
    if M == 0:
        return y
    matrices = [
        None if matrix is None else _movable(matrix)
        for matrix in (x.reshape(M, K), B1, A1, B2, A2, None if residual is None else residual.reshape(M, N))
    ]  # kept until the launch: copies among them are freed in the order of the stream
    vectors = [None if vector is None else _readable(vector) for vector in (b1, b2)]
    native.cuda_call(
        "lowrank_sm90",
        *(None if matrix is None else (matrix.data_ptr(), _row_stride(matrix)) for matrix in matrices),
        *(0 if vector is None else vector.data_ptr() for vector in vectors),
        y.data_ptr(), M, K, D, N, r1, r2, ACTS.index(act), x.dtype == torch.float16, plan,
        device=x.device,
    )  # fmt: skip
    return y


def _movable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where TMA does not take it: dense rows, a multiple of 16 bytes apart, from one on."""
    dense = matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0
    if dense and (len(matrix) == 1 or (matrix.stride(0) >= matrix.shape[1] and matrix.stride(0) % 8 == 0)):
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def _row_stride(matrix: Tensor) -> int:
    return matrix.shape[1] if len(matrix) == 1 else matrix.stride(0)


def _readable(vector: Tensor) -> Tensor:
    """The vector, or a copy where its values do not lie in pairs of 4 bytes."""
    return vector if vector.stride(0) == 1 and vector.data_ptr() % 4 == 0 else vector.clone()


def _candidate(op: str, name: str, run: Callable[..., Tensor]) -> None:
    worth = functools.partial(floors.pays, op, name)
    registry.register(op, registry.Candidate(name, _supports, run, worth=worth, floor=floor))


_candidate(lowrank_mlp.OP, "cuda.sm90", run_mlp)
_candidate(lowrank_linear.OP, "cuda.cluster", run_linear)
