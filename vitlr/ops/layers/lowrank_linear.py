"""`y = act(A (B x) + b) + residual`: two thin linears and what follows them as one operation."""

from __future__ import annotations

import math
from functools import partial
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

OP = "lowrank_linear"


class Key(NamedTuple):
    """What dispatch knows of a call; M is None while a graph with unknown rows is traced."""

    M: int | None
    K: int
    N: int
    r: int
    bias: bool = True
    act: str = "none"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def lowrank_linear(
    x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    """`y = act((x Bᵀ) Aᵀ + b) + residual`, act one of none, gelu, gelu_tanh, silu, sigmoid, relu.

    x [..., K], B [r, K], A [N, r], bias [N] or None, residual [..., N] or None -> y [..., N], contiguous.
    Differentiable in every tensor; runs what `vitlr.ops.explain("lowrank_linear", ...)` names.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_linear.default(x, B, A, bias, residual, act)


def reference(
    x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    """The specification, in plain torch."""
    t = F.linear(x, B)  # [..., r]
    y = ACTIVATIONS[act][0](F.linear(t, A, bias))  # [..., N]
    return y if residual is None else y + residual


def gradients(
    x: Tensor, B: Tensor, A: Tensor | None, g: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, B, A of `A (B x)` (`B x` where A is None) given g [..., N] at the output, where needed.

    `dx = Bᵀ Aᵀ g`, `dB = (Aᵀ g) xᵀ`, `dA = g (B x)ᵀ`. `B x` is computed again: it costs less than keeping it.
    """
    needs_x, needs_B, needs_A = needs
    s = g if A is None else g @ A  # [..., r]
    dx = s @ B if needs_x else None
    dB = _rows(s).mT @ _rows(x) if needs_B else None
    dA = _rows(g).mT @ _rows(F.linear(x, B)) if needs_A and A is not None else None
    return dx, dB, dA


def bias_gradient(g: Tensor) -> Tensor:
    """`db = Σ g` over the tokens, [N]."""
    return _rows(g).sum(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def roofline(
    M: int,
    K: int,
    N: int,
    r: int,
    dtype: torch.dtype,
    ceilings: registry.Ceilings | None = None,
    residual: bool = False,
) -> registry.Roofline:
    """`2 M r (K + N)` FLOPs over the compulsory bytes of x, y, A, B and a residual: the floor of one fused pass."""
    flops = 2 * M * r * (K + N)
    size = dtype.itemsize * ((M + r) * (K + N) + residual * M * N)
    return registry.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def two_gemms_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of two separate products in µs: the intermediate [M, r] is written and read once more."""
    # An activation reads and writes [M, N] once more, a residual reads two of that size and writes one.
    passes = (2 * (key.act != "none") + 3 * key.residual) * key.N
    return floors.separate(key.M or 0, [(key.K, key.N, key.r)], passes, key.dtype, ceilings)


def row_block_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of one pass in µs by programs of BM rows."""
    config, kernels, target = _tiles("row_block", _row_block_sizes(key), key.device)
    size = roofline(key.M or 0, key.K, key.N, key.r, key.dtype, residual=key.residual).bytes
    each = max(2 * config.BM * key.r * (key.K + key.N), _issued(config.BM * key.N, key.act, target))
    return floors.in_waves(each, kernels.tiles(key.M or 0, config), target.sms, size, key.dtype, ceilings)


def split_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of both launches in µs: the partial sums of the intermediate are written and read once."""
    config, kernels, target = _tiles("split", _split_sizes(key), key.device)
    M, K, N, r, size = key.M or 0, key.K, key.N, key.r, key.dtype.itemsize
    partial = M * r * (size if config.splits == 1 else 4 * config.splits)
    shrinking, expanding = kernels.tiles(M, N, r, config)
    tile = config.BM * config.BN
    steps = (
        (2 * config.BM * config.BR * K // config.splits, shrinking, size * (M + r) * K + partial),
        (
            max(2 * tile * r, _issued(tile, key.act, target)),
            expanding,
            size * (r + M * (1 + key.residual)) * N + partial,
        ),
    )
    times = [floors.in_waves(each, programs, target.sms, moved, key.dtype, ceilings) for each, programs, moved in steps]
    return None if None in times else sum(time for time in times if time is not None)


def _issued(elements: int, act: str, target: Any) -> float:
    """FLOPs that take as long as a program's activations: products and activations may at best overlap."""
    return triton.kernels("activations").issue_flops(elements, act, target)


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return registry.has_kernels(OP)


def kernel_chosen(x: Tensor, K: int, N: int, r: int, bias: bool) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced."""
    rows = None if torch.compiler.is_compiling() else x.numel() // K
    return registry.kernel_chosen(OP, rows, K, N, r, bias, "none", False, compute_dtype(x), x.device)


def check_pair(
    op: str,
    x: Tensor,
    names: tuple[str, str, str],
    B: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    K: int | None = None,
) -> int:
    """N, if an input [..., K], B [r, K], A [N, r] (or B [N, K] and no A) and b [N] or None fit; else InputError.

    The input is x, or something of x's dtype and device with K features.
    """
    B_name, A_name, b_name = names
    shape, dtype, device = B.shape, x.dtype, x.device
    if x.dim() == 0 or len(shape) != 2 or (x.shape[-1] if K is None else K) != shape[1]:
        raise InputError(
            f"{op}: x {list(x.shape)} and {B_name} {list(shape)} do not fit, expected x [..., K] and {B_name} [r, K]"
        )
    N = shape[0]
    if A is not None:
        if A.dim() != 2 or A.shape[1] != N:
            raise InputError(
                f"{op}: {A_name} {list(A.shape)} and {B_name} {list(shape)} do not fit, "
                f"expected {A_name} [N, r] and {B_name} [r, K]"
            )
        N = A.shape[0]
    if b is not None and (b.dim() != 1 or b.shape[0] != N):
        raise InputError(f"{op}: {b_name} {list(b.shape)} does not fit, expected [{N}]")
    for name, tensor in ((B_name, B), (A_name, A), (b_name, b)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise InputError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, x is {dtype} on {device}")
    return N


def check_residual(op: str, x: Tensor, N: int, residual: Tensor | None) -> None:
    """Raises InputError unless a residual is [..., N] with x's rows, dtype and device."""
    if residual is None:
        return
    expected = [*x.shape[:-1], N]
    if list(residual.shape) != expected:
        raise InputError(f"{op}: residual {list(residual.shape)} does not fit, expected {expected}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise InputError(f"{op}: residual is {residual.dtype} on {residual.device}, x is {x.dtype} on {x.device}")


def _check(x: Tensor, B: Tensor, A: Tensor, bias: Any, residual: Any, act: str) -> int:
    check_activation(OP, act)
    N = check_pair(OP, x, ("B", "A", "bias"), B, A, bias)
    check_residual(OP, x, N, residual)
    return N


_lib = torch.library.Library("vitlr", "FRAGMENT")
# No defaults: the dispatcher would strip them, and autograd would see calls of several lengths.
_lib.define("lowrank_linear(Tensor x, Tensor B, Tensor A, Tensor? bias, Tensor? residual, str act) -> Tensor")


@torch.library.register_fake("vitlr::lowrank_linear", lib=_lib)
def _fake(x: Tensor, B: Tensor, A: Tensor, bias: Any, residual: Any, act: str) -> Tensor:
    N = _check(x, B, A, bias, residual, act)
    return x.new_empty((*x.shape[:-1], N))


def _run(x: Tensor, B: Tensor, A: Tensor, bias: Any, residual: Any, act: str) -> Tensor:
    N = _check(x, B, A, bias, residual, act)
    K, r = x.shape[-1], B.shape[0]
    key = Key(x.numel() // max(K, 1), K, N, r, bias is not None, act, residual is not None, x.dtype, x.device)
    return registry.select(OP, key).run(x, B, A, bias, residual, act).contiguous()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, B, A, bias, _, ctx.act = inputs
    # x is the large one: frozen factors must not keep it alive, unless the activation's gradient asks for it.
    active = ctx.act != "none"
    keep = active or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if keep else None, B, A, bias if active else None)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, B, A, bias = ctx.saved_tensors
    needs_x, needs_B, needs_A, needs_bias, needs_residual, _ = ctx.needs_input_grad
    dp = g
    if ctx.act != "none" and (needs_x or needs_B or needs_A or needs_bias):
        dp = ACTIVATIONS[ctx.act][1](g, F.linear(F.linear(x, B), A, bias))
    found = gradients(x, B, A, dp, (needs_x, needs_B, needs_A))
    return (*found, bias_gradient(dp) if needs_bias else None, g if needs_residual else None, None)


_lib.impl("lowrank_linear", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::lowrank_linear", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.lowrank_linear.default)


@register_flop_formula(torch.ops.vitlr.lowrank_linear)
def _flops(x_shape: Any, B_shape: Any, A_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    K = x_shape[-1]
    M = math.prod(x_shape[:-1])
    return roofline(M, K, A_shape[0], B_shape[0], torch.float32).flops


registry.register_op(
    OP,
    Key,
    lambda key, limits: roofline(key.M or 0, key.K, key.N, key.r, key.dtype, limits, key.residual),
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=two_gemms_floor),
)


_MODULES = {"row_block": "lowrank_linear", "split": "lowrank_linear_split"}


def _row_block_sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.residual, key.dtype


def _split_sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.dtype


def _tiles(variant: str, sizes: tuple, device: torch.device) -> tuple[Any, Any, Any]:
    """The config of a variant, its module, and the target of the device."""
    config = triton.config(_MODULES[variant], variant, device, *sizes)
    return config, triton.kernels(_MODULES[variant]), triton.kernels("targets").target_of(device)


# The later one is taken where neither beats plain torch.
for _name, _sizes, _floor in (
    ("row_block", _row_block_sizes, row_block_floor),
    ("split", _split_sizes, split_floor),
):
    _worth = partial(floors.pays, OP, f"triton.{_name}")
    registry.register(OP, triton.candidate(_name, _MODULES[_name], _name, _sizes, "run", worth=_worth, floor=_floor))
