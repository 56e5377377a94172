"""`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual`: a whole transformer MLP of low-rank linears as one operation."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitlr.errors import InputError
from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.dispatch.autocast import compute_dtype, register_autocast
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.lowrank_linear import bias_gradient, check_pair, check_residual, gradients

OP = "lowrank_mlp"


class Key(NamedTuple):
    """What dispatch knows of a call; r1 or r2 is None where that linear is dense, M while rows are unknown."""

    M: int | None
    K: int
    D: int
    N: int
    r1: int | None
    r2: int | None
    act: str = "gelu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def lowrank_mlp(
    x: Tensor,
    B1: Tensor,
    A1: Tensor | None,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual`, act one of none, gelu, gelu_tanh, silu, sigmoid, relu.

    x [..., K], B1 [r1, K], A1 [D, r1], b1 [D], B2 [r2, D], A2 [N, r2], b2 [N] -> y [..., N], contiguous.
    A linear that stayed dense is its weight as B ([D, K] or [N, D]) and None as A; biases and residual may be None.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_mlp.default(x, B1, A1, b1, B2, A2, b2, residual, act)


def reference(
    x: Tensor,
    B1: Tensor,
    A1: Tensor | None,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """The specification, in plain torch."""
    p = pair(x, B1, A1, b1)  # [..., D]
    h = ACTIVATIONS[act][0](p)  # [..., D]
    y = pair(h, B2, A2, b2)  # [..., N]
    return y if residual is None else y + residual


def pair(x: Tensor, B: Tensor, A: Tensor | None, b: Tensor | None) -> Tensor:
    """`A (B x) + b`, or `B x + b` where A is None."""
    return F.linear(x, B, b) if A is None else F.linear(F.linear(x, B), A, b)


def weight_size(K: int, N: int, r: int | None) -> int:
    """Elements of a linear K -> N of rank r, dense where r is None."""
    return K * N if r is None else r * (K + N)


def roofline(
    M: int,
    K: int,
    D: int,
    N: int,
    r1: int | None,
    r2: int | None,
    dtype: torch.dtype,
    ceilings: registry.Ceilings | None = None,
    residual: bool = False,
) -> registry.Roofline:
    """`2 M` FLOPs a weight over the compulsory bytes of x, y, residual, weights: the hidden [M, D] need never exist."""
    weights = weight_size(K, D, r1) + weight_size(D, N, r2)
    flops = 2 * M * weights
    size = dtype.itemsize * (M * (K + N + residual * N) + weights)
    return registry.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate products, an activation that reads and writes [M, D] once, and the residual's sum."""
    passes = 2 * key.D * (key.act != "none") + 3 * key.N * key.residual
    linears = [(key.K, key.D, key.r1), (key.D, key.N, key.r2)]
    return floors.separate(key.M or 0, linears, passes, key.dtype, ceilings)


def row_block_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of one launch in µs: whole waves of row blocks, activations, compulsory bytes.

    `target`: of `triton_kernels.targets`, in place of the key's device.
    """
    kernels, target, sizes, floor = _planned(key, target)
    programs = kernels.tiles(key.M or 1, kernels.row_block(*sizes, target))
    # A processor multiplies and issues activations at once, so the longer of the two counts.
    work = max(floor.flops, _issued((key.M or 0) * key.D, key.act, target))
    return floors.in_waves(work / programs, programs, target.sms, floor.bytes, key.dtype, ceilings)


def split_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of both launches in µs: T is computed by every share of D, partial sums are written and read once."""
    kernels, target, sizes, floor = _planned(key, target)
    config, M, r1, r2 = kernels.split(*sizes, target), key.M or 0, key.r1, key.r2 or 0
    expanded, again = 2 * M * r2 * key.N, 0 if r1 is None else 2 * M * r1 * key.K * (config.splits - 1)
    partial = 4 * M * r2 * config.splits
    written = key.dtype.itemsize * (r2 + M * (1 + key.residual)) * key.N
    work = max(floor.flops - expanded + again, _issued(M * key.D, key.act, target))
    programs = kernels.tiles(key.M or 1, config) * config.splits
    moved = floor.bytes - written + partial
    one = floors.in_waves(work / programs, programs, target.sms, moved, key.dtype, ceilings)
    two = ceilings.microseconds(expanded, written + partial, key.dtype)
    return None if one is None or two is None else one + two


def _issued(elements: int, act: str, target: Any) -> float:
    return triton.kernels("activations").issue_flops(elements, act, target)


def _planned(key: Key, target: Any) -> tuple[Any, Any, tuple, registry.Roofline]:
    target = target or triton.kernels("targets").target_of(key.device)
    floor = roofline(key.M or 0, key.K, key.D, key.N, key.r1, key.r2, key.dtype, residual=key.residual)
    return triton.kernels("lowrank_mlp"), target, _sizes(key), floor


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.D, key.N, key.r1, key.r2, key.dtype


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return registry.has_kernels(OP)


def kernel_chosen(x: Tensor, K: int, D: int, N: int, r1: int | None, r2: int | None, act: str) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced."""
    rows = None if torch.compiler.is_compiling() else x.numel() // K
    return registry.kernel_chosen(OP, rows, K, D, N, r1, r2, act, False, compute_dtype(x), x.device)


def _check(
    x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Tensor, A2: Any, b2: Any, residual: Any, act: str
) -> tuple[int, int]:
    """(D, N) of a call that fits; else InputError."""
    check_activation(OP, act)
    D = check_pair(OP, x, ("B1", "A1", "b1"), B1, A1, b1)
    if B2.dim() != 2 or B2.shape[1] != D:
        raise InputError(f"{OP}: B2 {list(B2.shape)} does not fit the hidden width {D}, expected [r2, {D}]")
    N = check_pair(OP, x, ("B2", "A2", "b2"), B2, A2, b2, D)
    check_residual(OP, x, N, residual)
    return D, N


_lib = torch.library.Library("vitlr", "FRAGMENT")
_lib.define(
    "lowrank_mlp(Tensor x, Tensor B1, Tensor? A1, Tensor? b1, Tensor B2, Tensor? A2, Tensor? b2, Tensor? residual, "
    "str act) -> Tensor"
)


@torch.library.register_fake("vitlr::lowrank_mlp", lib=_lib)
def _fake(x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Tensor, A2: Any, b2: Any, residual: Any, act: str) -> Tensor:
    _, N = _check(x, B1, A1, b1, B2, A2, b2, residual, act)
    return x.new_empty((*x.shape[:-1], N))


def _run(x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Tensor, A2: Any, b2: Any, residual: Any, act: str) -> Tensor:
    D, N = _check(x, B1, A1, b1, B2, A2, b2, residual, act)
    K = x.shape[-1]
    r1, r2 = None if A1 is None else B1.shape[0], None if A2 is None else B2.shape[0]
    key = Key(x.numel() // max(K, 1), K, D, N, r1, r2, act, residual is not None, x.dtype, x.device)
    return registry.select(OP, key).run(x, B1, A1, b1, B2, A2, b2, residual, act).contiguous()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.act = inputs[8]
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, B1, A1, b1, B2, A2 = ctx.saved_tensors
    needs_x, needs_B1, needs_A1, needs_b1, needs_B2, needs_A2, needs_b2, needs_residual, _ = ctx.needs_input_grad
    activation, activation_gradient = ACTIVATIONS[ctx.act]
    db2 = bias_gradient(g) if needs_b2 else None
    below = needs_x or needs_B1 or needs_A1 or needs_b1
    dx = dB1 = dA1 = db1 = dB2 = dA2 = None
    if below or needs_B2 or needs_A2:
        # The hidden [M, D] is computed again: not keeping it is what the fused forward is for.
        p = pair(x, B1, A1, b1)
        dh, dB2, dA2 = gradients(activation(p), B2, A2, g, (below, needs_B2, needs_A2))
        if dh is not None:
            dp = activation_gradient(dh, p)
            dx, dB1, dA1 = gradients(x, B1, A1, dp, (needs_x, needs_B1, needs_A1))
            db1 = bias_gradient(dp) if needs_b1 else None
    return dx, dB1, dA1, db1, dB2, dA2, db2, g if needs_residual else None, None


_lib.impl("lowrank_mlp", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::lowrank_mlp", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.lowrank_mlp.default)


@register_flop_formula(torch.ops.vitlr.lowrank_mlp)
def _flops(
    x: Any, B1: Any, A1: Any, b1: Any, B2: Any, A2: Any, b2: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    M = math.prod(x[:-1])
    D, N = (B1 if A1 is None else A1)[0], (B2 if A2 is None else A2)[0]
    r1, r2 = None if A1 is None else B1[0], None if A2 is None else B2[0]
    return roofline(M, x[-1], D, N, r1, r2, torch.float32).flops


registry.register_op(
    OP,
    Key,
    lambda key, limits: roofline(key.M or 0, key.K, key.D, key.N, key.r1, key.r2, key.dtype, limits, key.residual),
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=separate_floor),
)


for _name, _launch, _floor in (("row_block", "run", row_block_floor), ("split", "run_split", split_floor)):
    _worth = functools.partial(floors.pays, OP, f"triton.{_name}")
    registry.register(OP, triton.candidate(_name, OP, _name, _sizes, _launch, worth=_worth, floor=_floor))
