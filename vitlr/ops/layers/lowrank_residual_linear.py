"""`y = A (B x) + R x + b`: a low-rank linear and a compact residual, in one pass over x."""

from __future__ import annotations

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
from vitlr.ops.layers.codes import FORMS, FP8, code_dtype, code_shape, decode, dequantise, groups
from vitlr.ops.layers.lowrank_linear import bias_gradient, check_pair, gradients

OP = "lowrank_residual_linear"
CONFIG = "lowrank_residual_config"  # of its Triton kernel


class Key(NamedTuple):
    """What dispatch knows of a call; M is None while a graph with unknown rows is traced."""

    M: int | None
    K: int
    N: int
    r: int
    form: str
    group_size: int
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def lowrank_residual_linear(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    R: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    form: str = "int8",
    group_size: int = 64,
) -> Tensor:
    """`y = (x Bᵀ) Aᵀ + x Rᵀ + b`, R stored as one of int8, int4, fp8, blockdiag (`vitlr.ops.layers.codes` says how).

    x [..., K], B [r, K], A [N, r], bias [N] or None -> y [..., N], contiguous. int8: R int8 [N, K]; int4: R uint8
    [N, ⌈K/2⌉]; fp8: R float8_e4m3fn [N, K], or its bits as uint8; these with scale [N, ⌈K/group_size⌉] in x's dtype.
    blockdiag: R [nb, N/nb, K/nb] in x's dtype, no scale, group_size = K/nb.
    Differentiable in x, B, A, bias, scale and a block-diagonal R; runs what `vitlr.ops.explain` names.
    Raises InputError for an unknown form and for shapes, dtypes or devices that do not fit.
    """
    if form == "fp8" and R.dtype == FP8:
        R = R.view(torch.uint8)
    return torch.ops.vitlr.lowrank_residual_linear.default(x, B, A, R, scale, bias, form, group_size)


def reference(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Tensor | None, bias: Tensor | None, form: str, group_size: int
) -> Tensor:
    """The specification, in plain torch."""
    y = F.linear(F.linear(x, B), A, bias)  # [..., N]
    return y + residual(x, R, scale, form, group_size)


def residual(x: Tensor, R: Tensor, scale: Tensor | None, form: str, group_size: int) -> Tensor:
    """`x Rᵀ` [..., N] for x [..., K]."""
    if form == "blockdiag":
        return torch.einsum("...bk,bnk->...bn", x.unflatten(-1, (-1, group_size)), R).flatten(-2)
    return F.linear(x, dequantise(R, scale, form, group_size, x.shape[-1]))


def _residual_size(K: int, N: int, form: str, group_size: int) -> int:
    """Entries of R that may differ from zero: multiplications a row."""
    return N * group_size if form == "blockdiag" else N * K


def roofline(
    M: int,
    K: int,
    N: int,
    r: int,
    form: str,
    group_size: int,
    dtype: torch.dtype,
    ceilings: registry.Ceilings | None = None,
) -> registry.Roofline:
    """`2 M (r (K + N) + |R|)` FLOPs over the compulsory bytes of x, y, A, B, the stored R and its scales."""
    flops = 2 * M * (r * (K + N) + _residual_size(K, N, form, group_size))
    rows = 1
    for extent in code_shape(form, N, K, group_size):
        rows *= extent
    scales = 0 if form == "blockdiag" else N * groups(K, group_size)
    size = dtype.itemsize * ((M + r) * (K + N) + scales) + rows * code_dtype(form, dtype).itemsize
    return registry.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate steps: shrink, expand, R written out, `R x`, and the sum of both outputs."""
    M, K, N, size = key.M or 0, key.K, key.N, key.dtype.itemsize
    R = _residual_size(K, N, key.form, key.group_size)
    products = [
        (M * key.r * K, M * (K + key.r) + key.r * K),  # multiplications, entries moved
        (M * N * key.r, M * (N + key.r) + N * key.r),
        (M * R, M * (K + N) + R),
    ]
    steps = [ceilings.microseconds(2 * macs, size * entries, key.dtype) for macs, entries in products]
    moved = 3 * M * N * size
    if key.form != "blockdiag":
        codes = code_shape(key.form, N, K, key.group_size)
        moved += codes[0] * codes[1] + R * size
    steps.append(1e6 * moved / ceilings.bytes_per_s)
    return None if None in steps else sum(step for step in steps if step is not None)


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return registry.has_kernels(OP)


def kernel_chosen(x: Tensor, K: int, N: int, r: int, form: str, group_size: int, bias: bool) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced."""
    rows = None if torch.compiler.is_compiling() else x.numel() // K
    return registry.kernel_chosen(OP, rows, K, N, r, form, group_size, bias, compute_dtype(x), x.device)


def check_form(op: str, N: int, K: int, form: str, group_size: int) -> None:
    """Raises InputError unless a residual [N, K] can be stored in that form."""
    if form not in FORMS:
        raise InputError(f"{op}: unknown form {form!r} of the residual, expected one of {', '.join(FORMS)}")
    if group_size < 1:
        raise InputError(f"{op}: group_size {group_size}, expected 1 or more")
    if form == "blockdiag" and (K % group_size or N % (K // group_size)):
        raise InputError(
            f"{op}: no blocks of {group_size} columns fit R {N}x{K}, expected group_size to divide K = {K} and "
            f"K / group_size to divide N = {N}"
        )


def check_residual(op: str, x: Tensor, N: int, R: Tensor, scale: Tensor | None, form: str, group_size: int) -> None:
    """Raises InputError unless R and its scale are those of an [N, K] residual for x [..., K]."""
    K = x.shape[-1]
    check_form(op, N, K, form, group_size)
    shape, dtype = list(code_shape(form, N, K, group_size)), code_dtype(form, x.dtype)
    if list(R.shape) != shape or R.dtype != dtype or R.device != x.device:
        raise InputError(
            f"{op}: R is {list(R.shape)} {R.dtype} on {R.device}, "
            f"expected {shape} {dtype} on {x.device} for form {form!r} and group_size {group_size}"
        )
    if form == "blockdiag":
        if scale is not None:
            raise InputError(f"{op}: form 'blockdiag' has no scale, got {list(scale.shape)}; pass None")
        return
    expected = [N, groups(K, group_size)]
    if scale is None:
        raise InputError(f"{op}: form {form!r} needs a scale {expected}, got None")
    if list(scale.shape) != expected or scale.dtype != x.dtype or scale.device != x.device:
        raise InputError(
            f"{op}: scale is {list(scale.shape)} {scale.dtype} on {scale.device}, "
            f"expected {expected} {x.dtype} on {x.device}"
        )


def _check(x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Any, bias: Any, form: str, group_size: int) -> int:
    N = check_pair(OP, x, ("B", "A", "bias"), B, A, bias)
    check_residual(OP, x, N, R, scale, form, group_size)
    return N


_lib = torch.library.Library("vitlr", "FRAGMENT")
# No defaults: the dispatcher would strip them, and autograd would see calls of several lengths.
_lib.define(
    "lowrank_residual_linear(Tensor x, Tensor B, Tensor A, Tensor R, Tensor? scale, Tensor? bias, str form, "
    "int group_size) -> Tensor"
)


@torch.library.register_fake("vitlr::lowrank_residual_linear", lib=_lib)
def _fake(x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Any, bias: Any, form: str, group_size: int) -> Tensor:
    N = _check(x, B, A, R, scale, bias, form, group_size)
    return x.new_empty((*x.shape[:-1], N))


def _run(x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Any, bias: Any, form: str, group_size: int) -> Tensor:
    N = _check(x, B, A, R, scale, bias, form, group_size)
    K, r = x.shape[-1], B.shape[0]
    key = Key(x.numel() // max(K, 1), K, N, r, form, group_size, bias is not None, x.dtype, x.device)
    return registry.select(OP, key).run(x, B, A, R, scale, bias, form, group_size).contiguous()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, B, A, R, scale, _, ctx.form, ctx.group_size = inputs
    # x is the large one: a frozen layer must not keep it alive.
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:5]) else None, B, A, R, scale)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, B, A, R, scale = ctx.saved_tensors
    needs_x, needs_B, needs_A, needs_R, needs_scale, needs_bias, _, _ = ctx.needs_input_grad
    dx, dB, dA = gradients(x, B, A, g, (needs_x, needs_B, needs_A))
    if dx is not None:
        dx = dx + _transposed(g, R, scale, ctx.form, ctx.group_size, B.shape[1])
    dR = dscale = None
    if needs_R:  # block-diagonal: codes are not differentiable
        columns = x.reshape(-1, len(R), ctx.group_size)
        dR = torch.einsum("mbn,mbk->bnk", g.reshape(-1, *R.shape[:2]), columns)
    if needs_scale:
        K = x.shape[-1]
        dense = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, K)  # the gradient of a dense R, [N, K]
        dscale = _group_sums(dense * decode(R, ctx.form, K, dense.dtype), ctx.group_size)
    return dx, dB, dA, dR, dscale, bias_gradient(g) if needs_bias else None, None, None


def _transposed(g: Tensor, R: Tensor, scale: Tensor | None, form: str, group_size: int, K: int) -> Tensor:
    """`g R` [..., K] for g [..., N]."""
    if form == "blockdiag":
        return torch.einsum("...bn,bnk->...bk", g.unflatten(-1, R.shape[:2]), R).flatten(-2)
    return g @ dequantise(R, scale, form, group_size, K)


def _group_sums(values: Tensor, group_size: int) -> Tensor:
    """Sums over every group of columns, [N, K] -> [N, groups]."""
    K = values.shape[1]
    return F.pad(values, (0, -K % group_size)).unflatten(1, (-1, group_size)).sum(-1)


_lib.impl("lowrank_residual_linear", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::lowrank_residual_linear", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.lowrank_residual_linear.default)


@register_flop_formula(torch.ops.vitlr.lowrank_residual_linear)
def _flops(
    x: Any,
    B: Any,
    A: Any,
    R: Any,
    scale: Any,
    bias: Any,
    form: str,
    group_size: int,
    *,
    out_shape: Any = None,
    **_: Any,
) -> int:
    M = math.prod(x[:-1])
    return roofline(M, x[-1], A[0], B[0], form, group_size, torch.float32).flops


registry.register_op(
    OP,
    Key,
    lambda key, limits: roofline(key.M or 0, key.K, key.N, key.r, key.form, key.group_size, key.dtype, limits),
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=separate_floor),
)


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.form, key.group_size, key.dtype


def _kernel_floor(variant: str) -> Any:
    """The floor of a variant in µs: its own FLOPs on whole waves of tiles or the compulsory bytes, and T's launch."""

    def floor(key: Key, ceilings: registry.Ceilings) -> float | None:
        kernels, (rows, K, N, r, form, group_size, dtype) = triton.kernels(CONFIG), _sizes(key)
        M, fused = rows or 1, variant == "one_pass"
        target = triton.kernels("targets").target_of(key.device)
        config = getattr(kernels, variant)(*_sizes(key), target)
        tiles = kernels.tiles(M, K, N, form, group_size, config)
        each = kernels.flops(M, K, N, r, form, group_size, config, fused) / tiles
        size = roofline(M, K, N, r, form, group_size, dtype).bytes
        main = floors.in_waves(each, tiles, target.sms, size, dtype, ceilings)
        shrink = 0.0 if fused else ceilings.microseconds(2 * M * r * K, dtype.itemsize * (M * (K + r) + r * K), dtype)
        return None if main is None or shrink is None else main + shrink

    return floor


_LAUNCH = 2e9  # FLOPs that a GPU of the H200's class does while a launch gets going


def _one_pass_pays(key: Key) -> str | None:
    """Every tile along N computes T again: it has to cost less than the launch that computes it once."""
    kernels = triton.kernels(CONFIG)
    config = kernels.one_pass(*_sizes(key), triton.kernels("targets").target_of(key.device))
    given = (key.M or 1, key.K, key.N, key.r, key.form, key.group_size, config)
    again = kernels.flops(*given, True) - kernels.flops(*given, False) - 2 * (key.M or 1) * key.r * key.K
    return f"T again for every tile along N: {again / 1e9:.1f} GFLOP" if again > _LAUNCH else None


def _candidate(variant: str, **more: Any) -> registry.Candidate:
    return triton.candidate(variant, OP, variant, _sizes, f"run_{variant}", floor=_kernel_floor(variant), **more)


registry.register(OP, _candidate("two_pass"))
registry.register(OP, _candidate("one_pass", worth=_one_pass_pays))  # the last one is asked first
