"""`y = A (B x) + b`: two thin linears as one operation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitlr.errors import InputError
from vitlr.ops import _dispatch
from vitlr.ops._autocast import compute_dtype, register_autocast

OP = "lowrank_linear"


class Key(NamedTuple):
    """What dispatch knows of a call; M is None while a graph with unknown rows is traced."""

    M: int | None
    K: int
    N: int
    r: int
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def lowrank_linear(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = (x Bᵀ) Aᵀ + b`: x [..., K], B [r, K], A [N, r], bias [N] or None -> y [..., N], contiguous.

    Differentiable in every argument; runs what `vitlr.ops.explain("lowrank_linear", ...)` names.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_linear.default(x, B, A, bias)


def reference(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in plain torch."""
    t = F.linear(x, B)  # [..., r]
    return F.linear(t, A, bias)  # [..., N]


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
    M: int, K: int, N: int, r: int, dtype: torch.dtype, ceilings: _dispatch.Ceilings | None = None
) -> _dispatch.Roofline:
    """`2 M r (K + N)` FLOPs over the compulsory bytes of x, y, A, B: the floor of one fused pass, in µs."""
    flops = 2 * M * r * (K + N)
    size = dtype.itemsize * (M + r) * (K + N)
    return _dispatch.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def two_gemms_floor(key: Key, ceilings: _dispatch.Ceilings) -> float | None:
    """The floor of two separate products in µs: the intermediate [M, r] is written and read once more."""
    M = key.M or 0
    steps = [
        ceilings.microseconds(2 * M * n * k, key.dtype.itemsize * (M * (n + k) + n * k), key.dtype)
        for k, n in ((key.K, key.r), (key.r, key.N))
    ]
    return None if None in steps else sum(step for step in steps if step is not None)


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return _dispatch.has_kernels(OP)


def kernel_chosen(x: Tensor, K: int, N: int, r: int, bias: bool) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for x [..., K]; a constant where a graph is traced."""
    rows = None if torch.compiler.is_compiling() else x.numel() // K
    return _dispatch.kernel_chosen(OP, rows, K, N, r, bias, compute_dtype(x), x.device)


def check_pair(op: str, x: Tensor, names: tuple[str, str, str], B: Tensor, A: Tensor | None, b: Tensor | None) -> int:
    """N, if x [..., K], B [r, K], A [N, r] (or B [N, K] and no A) and b [N] or None fit together; else InputError."""
    B_name, A_name, b_name = names
    if x.dim() == 0 or B.dim() != 2 or x.shape[-1] != B.shape[1]:
        raise InputError(
            f"{op}: x {list(x.shape)} and {B_name} {list(B.shape)} do not fit, expected x [..., K] and {B_name} [r, K]"
        )
    N = B.shape[0]
    if A is not None:
        if A.dim() != 2 or A.shape[1] != B.shape[0]:
            raise InputError(
                f"{op}: {A_name} {list(A.shape)} and {B_name} {list(B.shape)} do not fit, "
                f"expected {A_name} [N, r] and {B_name} [r, K]"
            )
        N = A.shape[0]
    if b is not None and (b.dim() != 1 or b.shape[0] != N):
        raise InputError(f"{op}: {b_name} {list(b.shape)} does not fit, expected [{N}]")
    for name, tensor in ((B_name, B), (A_name, A), (b_name, b)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise InputError(f"{op}: {name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    return N


_NAMES = ("B", "A", "bias")
_lib = torch.library.Library("vitlr", "FRAGMENT")
# No default for bias: the dispatcher would strip it, and autograd would see calls of two lengths.
_lib.define("lowrank_linear(Tensor x, Tensor B, Tensor A, Tensor? bias) -> Tensor")


@torch.library.register_fake("vitlr::lowrank_linear", lib=_lib)
def _fake(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    N = check_pair(OP, x, _NAMES, B, A, bias)
    return x.new_empty((*x.shape[:-1], N))


def _run(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None) -> Tensor:
    N = check_pair(OP, x, _NAMES, B, A, bias)
    K, r = x.shape[-1], B.shape[0]
    key = Key(x.numel() // max(K, 1), K, N, r, bias is not None, x.dtype, x.device)
    return _dispatch.select(OP, key).run(x, B, A, bias).contiguous()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, B, A, _ = inputs
    # x is the large one: frozen factors must not keep it alive.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, B, A)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, B, A = ctx.saved_tensors
    needs_x, needs_B, needs_A, needs_bias = ctx.needs_input_grad
    return (*gradients(x, B, A, g, (needs_x, needs_B, needs_A)), bias_gradient(g) if needs_bias else None)


_lib.impl("lowrank_linear", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::lowrank_linear", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.lowrank_linear.default)


@register_flop_formula(torch.ops.vitlr.lowrank_linear)
def _flops(x_shape: Any, B_shape: Any, A_shape: Any, bias_shape: Any = None, *, out_shape: Any = None, **_: Any) -> int:
    K = x_shape[-1]
    M = 1
    for size in x_shape[:-1]:
        M *= size
    return roofline(M, K, A_shape[0], B_shape[0], torch.float32).flops


_dispatch.register_op(
    OP,
    Key,
    lambda key, ceilings: roofline(key.M or 0, key.K, key.N, key.r, key.dtype, ceilings),
    _dispatch.Candidate("torch", lambda key: None, reference, ran_on=("CPU",), floor=two_gemms_floor),
)
