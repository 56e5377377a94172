"""A linear as layer ops take it: two factors, or a dense weight in their place; its value, checks and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError

Maybe = Tensor | None  # what a call may leave out: A of a linear that stayed dense, a bias, something to add


class Factors(NamedTuple):
    """`y = A (B x) + b`, B [r, K], A [N, r], b [N] or None; of a dense linear B is its weight [N, K], and A None."""

    B: Tensor
    A: Maybe
    b: Maybe

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, *self)

    @property
    def rank(self) -> int | None:
        """r, or None where the linear is dense."""
        return None if self.A is None else self.B.shape[0]

    def gradients(self, x: Maybe, g: Tensor, needs: tuple[bool, ...]) -> tuple[Maybe, Maybe, Maybe, Maybe]:
        """Gradients for x, B, A, b given g [..., N] at the output, each where `needs` says so, else None.

        `dx = Bᵀ Aᵀ g`, `dB = (Aᵀ g) xᵀ`, `dA = g (B x)ᵀ`, `db = Σ g`. x may be None where neither dB nor dA is needed.
        `B x` is computed again: it costs less than keeping it.
        """
        B, A, _ = self
        needs_x, needs_B, needs_A, needs_b = needs
        s = g if A is None else g @ A  # [..., r]
        dx = s @ B if needs_x else None
        dB = _rows(s).mT @ _rows(x) if needs_B and x is not None else None
        dA = _rows(g).mT @ _rows(F.linear(x, B)) if needs_A and A is not None and x is not None else None
        return dx, dB, dA, _rows(g).sum(0) if needs_b else None


def linear(x: Tensor, B: Tensor, A: Maybe, b: Maybe) -> Tensor:
    """`A (B x) + b`, or `B x + b` where A is None."""
    return F.linear(x, B, b) if A is None else F.linear(F.linear(x, B), A, b)


def check(op: str, x: Tensor, names: tuple[str, str, str], B: Tensor, A: Maybe, b: Maybe, K: int | None = None) -> int:
    """N, if an input [..., K] and the factors B, A, b fit; else InputError, by their `names`.

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


def check_second(op: str, x: Tensor, D: int, B: Tensor, A: Maybe, b: Maybe) -> int:
    """N, if the linear B2, A2, b2 of an MLP fits the hidden width D; else InputError."""
    if B.dim() != 2 or B.shape[1] != D:
        raise InputError(f"{op}: B2 {list(B.shape)} does not fit the hidden width {D}, expected [r2, {D}]")
    return check(op, x, ("B2", "A2", "b2"), B, A, b, D)


def check_added(op: str, x: Tensor, N: int, residual: Maybe) -> None:
    """Raises InputError unless the tensor to add is None, or [..., N] with x's rows, dtype and device."""
    if residual is None:
        return
    expected = [*x.shape[:-1], N]
    if list(residual.shape) != expected:
        raise InputError(f"{op}: residual {list(residual.shape)} does not fit, expected {expected}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise InputError(f"{op}: residual is {residual.dtype} on {residual.device}, x is {x.dtype} on {x.device}")


def weight_size(K: int, N: int, r: int | None) -> int:
    """Elements of a linear K -> N of rank r, dense where r is None."""
    return K * N if r is None else r * (K + N)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
