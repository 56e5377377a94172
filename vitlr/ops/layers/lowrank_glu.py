"""`y = A₂ (B₂ (act(A_g (B_g x) + b_g) ∘ (A_v (B_v x) + b_v))) + b₂ + residual`: a gated MLP of low-rank linears."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitlr.errors import InputError
from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.dispatch.autocast import compute_dtype, register_autocast
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.lowrank_linear import bias_gradient, check_pair, check_residual, gradients
from vitlr.ops.layers.lowrank_mlp import pair, weight_size

OP = "lowrank_glu"


class Key(NamedTuple):
    """What dispatch knows of a call; a rank is None where that linear is dense, M while rows are unknown.

    `shared`: gate and value have one B, as the halves of a packed low-rank fc1 do.
    """

    M: int | None
    K: int
    D: int
    N: int
    rg: int | None
    rv: int | None
    r2: int | None
    shared: bool = False
    act: str = "silu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def lowrank_glu(
    x: Tensor,
    Bg: Tensor,
    Ag: Tensor | None,
    bg: Tensor | None,
    Bv: Tensor,
    Av: Tensor | None,
    bv: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """`y = A₂ (B₂ (act(A_g (B_g x) + b_g) ∘ (A_v (B_v x) + b_v))) + b₂ + residual`, act as in `lowrank_mlp`.

    x [..., K], Bg [rg, K], Ag [D, rg], bg [D], Bv [rv, K], Av [D, rv], bv [D], B2 [r2, D], A2 [N, r2], b2 [N],
    residual [..., N] -> y [..., N], contiguous. A linear that stayed dense is its weight as B and None as A; biases
    and residual may be None. One tensor as Bg and Bv, as for the halves of a packed fc1, is multiplied once.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_glu.default(x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, act)


def reference(
    x: Tensor,
    Bg: Tensor,
    Ag: Tensor | None,
    bg: Tensor | None,
    Bv: Tensor,
    Av: Tensor | None,
    bv: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """The specification, in plain torch."""
    h = ACTIVATIONS[act][0](pair(x, Bg, Ag, bg)) * pair(x, Bv, Av, bv)  # [..., D]
    y = pair(h, B2, A2, b2)  # [..., N]
    return y if residual is None else y + residual


def roofline(
    M: int,
    K: int,
    D: int,
    N: int,
    rg: int | None,
    rv: int | None,
    r2: int | None,
    dtype: torch.dtype,
    ceilings: registry.Ceilings | None = None,
    shared: bool = False,
    residual: bool = False,
) -> registry.Roofline:
    """`2 M` FLOPs a weight over the compulsory bytes of x, y, residual, weights; a shared B counts once in both."""
    weights = weight_size(K, D, rg) + weight_size(K, D, rv) + weight_size(D, N, r2) - (rg or 0) * K * shared
    flops = 2 * M * weights
    size = dtype.itemsize * (M * (K + N + residual * N) + weights)
    return registry.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate products, of the gating's two passes over [M, D], and of the residual's sum."""
    linears = [(key.K, key.D, key.rg), (key.K, key.D, key.rv), (key.D, key.N, key.r2)]
    passes = (2 * (key.act != "none") + 3) * key.D + 3 * key.N * key.residual
    return floors.separate(key.M or 0, linears, passes, key.dtype, ceilings)


def row_block_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of one launch in µs: whole waves of row blocks, activations, compulsory bytes.

    `target`: of `triton_kernels.targets`, in place of the key's device.
    """
    target = target or triton.kernels("targets").target_of(key.device)
    kernels = triton.kernels(OP)
    sizes = (key.M or 0, key.K, key.D, key.N, key.rg, key.rv, key.r2, key.dtype)
    floor = roofline(*sizes, shared=key.shared, residual=key.residual)
    programs = kernels.tiles(key.M or 1, kernels.row_block(*_sizes(key), target))
    issued = triton.kernels("activations").issue_flops((key.M or 0) * key.D, key.act, target)
    work = max(floor.flops, issued) / programs
    return floors.in_waves(work, programs, target.sms, floor.bytes, key.dtype, ceilings)


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.D, key.N, key.rg, key.rv, key.r2, key.shared, key.dtype


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return registry.has_kernels(OP)


def kernel_chosen(
    x: Tensor, K: int, D: int, N: int, rg: int | None, rv: int | None, r2: int | None, shared: bool, act: str
) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced."""
    rows = None if torch.compiler.is_compiling() else x.numel() // K
    return registry.kernel_chosen(OP, rows, K, D, N, rg, rv, r2, shared, act, False, compute_dtype(x), x.device)


def _check(
    x: Tensor, Bg: Tensor, Ag: Any, bg: Any, Bv: Tensor, Av: Any, bv: Any, B2: Tensor, A2: Any, b2: Any, residual: Any,
    act: str,
) -> tuple[int, int]:  # fmt: skip
    """(D, N) of a call that fits; else InputError."""
    check_activation(OP, act)
    D = check_pair(OP, x, ("Bg", "Ag", "bg"), Bg, Ag, bg)
    width = check_pair(OP, x, ("Bv", "Av", "bv"), Bv, Av, bv)
    if width != D:
        raise InputError(f"{OP}: gate and value do not fit, they are {D} and {width} wide")
    if B2.dim() != 2 or B2.shape[1] != D:
        raise InputError(f"{OP}: B2 {list(B2.shape)} does not fit the hidden width {D}, expected [r2, {D}]")
    N = check_pair(OP, x, ("B2", "A2", "b2"), B2, A2, b2, D)
    check_residual(OP, x, N, residual)
    return D, N


_lib = torch.library.Library("vitlr", "FRAGMENT")
_lib.define(
    "lowrank_glu(Tensor x, Tensor Bg, Tensor? Ag, Tensor? bg, Tensor Bv, Tensor? Av, Tensor? bv, Tensor B2, "
    "Tensor? A2, Tensor? b2, Tensor? residual, str act) -> Tensor"
)


@torch.library.register_fake("vitlr::lowrank_glu", lib=_lib)
def _fake(x: Tensor, *args: Any) -> Tensor:
    _, N = _check(x, *args)
    return x.new_empty((*x.shape[:-1], N))


def _run(
    x: Tensor, Bg: Tensor, Ag: Any, bg: Any, Bv: Tensor, Av: Any, bv: Any, B2: Tensor, A2: Any, b2: Any, residual: Any,
    act: str,
) -> Tensor:  # fmt: skip
    D, N = _check(x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, act)
    K = x.shape[-1]
    rg, rv, r2 = (None if A is None else B.shape[0] for B, A in ((Bg, Ag), (Bv, Av), (B2, A2)))
    shared = rg is not None and rv is not None and _same(Bg, Bv)
    M = x.numel() // max(K, 1)
    key = Key(M, K, D, N, rg, rv, r2, shared, act, residual is not None, x.dtype, x.device)
    return registry.select(OP, key).run(x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, act).contiguous()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one memory seen in one way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.act = inputs[11]
    ctx.save_for_backward(*inputs[:9])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, Bg, Ag, bg, Bv, Av, bv, B2, A2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_x, (needs_B2, needs_A2, needs_b2, needs_residual) = needs[0], needs[7:11]
    activation, activation_gradient = ACTIVATIONS[ctx.act]
    found: dict[str, Tensor | None] = {}
    below = any(needs[:7])
    if below or needs_B2 or needs_A2:
        # Gate and value [M, D] are computed again: not keeping them is what the fused forward is for.
        p, v = pair(x, Bg, Ag, bg), pair(x, Bv, Av, bv)
        a = activation(p)
        dh, found["B2"], found["A2"] = gradients(a * v, B2, A2, g, (below, needs_B2, needs_A2))
        if dh is not None:
            dp, dv = activation_gradient(dh * v, p), dh * a
            dx, found["Bg"], found["Ag"] = gradients(x, Bg, Ag, dp, (needs_x, needs[1], needs[2]))
            more, found["Bv"], found["Av"] = gradients(x, Bv, Av, dv, (needs_x, needs[4], needs[5]))
            found["x"] = None if dx is None or more is None else dx + more
            found["bg"] = bias_gradient(dp) if needs[3] else None
            found["bv"] = bias_gradient(dv) if needs[6] else None
    names = ("x", "Bg", "Ag", "bg", "Bv", "Av", "bv", "B2", "A2")
    db2 = bias_gradient(g) if needs_b2 else None
    return (*(found.get(name) for name in names), db2, g if needs_residual else None, None)


_lib.impl("lowrank_glu", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::lowrank_glu", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.lowrank_glu.default)


@register_flop_formula(torch.ops.vitlr.lowrank_glu)
def _flops(
    x: Any, Bg: Any, Ag: Any, bg: Any, Bv: Any, Av: Any, bv: Any, B2: Any, A2: Any, *_: Any, out_shape: Any = None,
    **__: Any,
) -> int:  # fmt: skip
    """What the reference computes: shapes do not tell whether B is shared."""
    M = math.prod(x[:-1])
    D, N = B2[1], (B2 if A2 is None else A2)[0]
    rg, rv, r2 = (None if A is None else B[0] for B, A in ((Bg, Ag), (Bv, Av), (B2, A2)))
    return roofline(M, x[-1], D, N, rg, rv, r2, torch.float32).flops


registry.register_op(
    OP,
    Key,
    lambda key, limits: roofline(
        key.M or 0, key.K, key.D, key.N, key.rg, key.rv, key.r2, key.dtype, limits, key.shared, key.residual
    ),
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=separate_floor),
)
_worth = functools.partial(floors.pays, OP, "triton.row_block")
registry.register(
    OP, triton.candidate("row_block", OP, "row_block", _sizes, "run", worth=_worth, floor=row_block_floor)
)
