"""A linear layer stored as two thin ones: `y = A (B x) + b`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError, NumericalError
from vitlr.nn._plain import has_hooks, is_plain, is_transformed
from vitlr.nn._weightless import Weightless
from vitlr.nn.fp8_linear import Fp8Linear
from vitlr.nn.int8_linear import Int8Linear
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_linear as op
from vitlr.ops.linalg.factors import balance


class LowRankLinear(Weightless):
    """`y = A (B x) + b`: A = `up.weight` [N, r], B = `down.weight` [r, K], b = `up.bias` [N]; x [..., K] -> y [..., N].

    Two `nn.Linear` children, so that quantisers, adapters, FLOP counters and exporters see linears. Of
    `weight` there is only dtype, device and shape: a model that computes with it past `forward` is told so.
    Two children that are `Int8Linear`s or `Fp8Linear`s run as one chain of bytes.
    A kernel runs only where dispatch chooses one and both children are plain; otherwise the children are called.
    Raises InputError for a rank outside 1..min(K, N).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise InputError(
                f"rank {rank} does not fit a linear {in_features} -> {out_features}: "
                f"expected 1..{min(in_features, out_features)}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def bias(self) -> Tensor | None:
        """That of the second factor, [N], or None: a parent may ask whether there is one."""
        return self.up.bias

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance of `nn.Linear`'s weight: Var[(A B)_ij] = 1 / (3 K)."""
        # That variance is r Var(A) Var(B), split so that both stages scale a signal alike; uniform on ±u has u²/3.
        for factor, fan_in in ((self.down, self.in_features), (self.up, self.rank)):
            u = math.sqrt(math.sqrt(3) / fan_in)
            nn.init.uniform_(factor.weight, -u, u)
        if self.up.bias is not None:
            u = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.up.bias, -u, u)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.up(self.down(x))
        return self._dispatched(x)

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        for kind in () if is_transformed() else BYTES:
            if (steps := steps_of(self, kind)) is not None:
                return kind.CHAIN(x, steps, ["none", "none"])
        if has_kernels(op.OP) and not is_transformed() and is_plain(self.down) and is_plain(self.up):
            B, A, bias = self.down.weight, self.up.weight, self.up.bias
            sizes = (self.in_features, self.out_features, self.rank)
            if kernel_chosen(op.OP, x, *sizes, bias is not None, "none", False):
                return op.lowrank_linear(x, B, A, bias)
        return self.up(self.down(x))

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        """The layer `A B x + b` with copies of A [N, r], B [r, K], bias [N] or None, on A's device in A's dtype.

        `device` and `dtype` choose others. Raises InputError for shapes that do not fit.
        """
        if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0]:
            raise InputError(
                f"factors do not fit: A {list(A.shape)}, B {list(B.shape)}, expected A [N, r] and B [r, K]"
            )
        if bias is not None and bias.shape != A.shape[:1]:
            raise InputError(f"bias {list(bias.shape)} does not fit A {list(A.shape)}, expected [{A.shape[0]}]")
        # On meta first: no memory is filled with random numbers, and the caller's generator stays where it is.
        layer = cls(B.shape[1], A.shape[0], A.shape[1], bias=bias is not None, device="meta")

        def parameter(value: Tensor) -> nn.Parameter:
            value = value.detach().to(device=device or A.device, dtype=dtype or A.dtype, copy=True)
            return nn.Parameter(value.contiguous())

        layer.down.weight = parameter(B)
        layer.up.weight = parameter(A)
        if bias is not None:
            layer.up.bias = parameter(bias)
        return layer

    @classmethod
    def from_layers(cls, down: nn.Module, up: nn.Module) -> LowRankLinear:
        """The layer `up(down(x))` of two that fit, such as layers of integers; they become its children."""
        K, r, N = (int(size) for size in (down.in_features, down.out_features, up.out_features))  # type: ignore[arg-type]
        layer = cls(K, N, r, bias=up.bias is not None, device="meta")
        layer.down, layer.up = down, up  # type: ignore[assignment]
        return layer

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """The best rank-r layer in the Frobenius norm: `W = U Σ Vᵀ`, A = U_r Σ_r^½, B = Σ_r^½ V_rᵀ, solved in fp64.

        Same device, dtype and mode as `linear` (Eckart-Young; it knows nothing of the inputs: see `vitlr.plan`).
        Raises InputError for a rank outside 1..min(K, N) or what is no linear, NumericalError for NaN or Inf.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
        W = linear.weight
        if not 1 <= rank <= min(W.shape):
            raise InputError(f"rank {rank} does not fit a weight {list(W.shape)}: expected 1..{min(W.shape)}")
        if not torch.isfinite(W).all():
            raise NumericalError(f"weight {list(W.shape)} holds NaN or Inf: no factors of it")
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        root = S[:rank].sqrt()
        layer = cls.from_factors(U[:, :rank] * root, root[:, None] * Vh[:rank], linear.bias, dtype=W.dtype)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function, `W = A B` multiplied in fp64; same device, dtype and mode.

        Raises InputError if a child is no longer a plain linear (merge the adapter, dequantise first).
        """
        for name, child in (("down", self.down), ("up", self.up)):
            if not isinstance(child, nn.Linear) or type(child.weight) not in (nn.Parameter, Tensor):
                what = type(child.weight).__name__ if isinstance(child, nn.Linear) else type(child).__name__
                raise InputError(f"`{name}` holds a {what}, not a plain linear: merge or undo that before to_linear()")
        A, B = self.up.weight, self.down.weight
        bias: Tensor | None = self.up.bias
        if self.down.bias is not None:  # of one that was of bytes
            moved = A.double() @ self.down.bias.double()
            bias = (moved if bias is None else moved + bias.double()).to(A.dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter((A.double() @ B.double()).to(A.dtype))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    @torch.no_grad()
    def balance(self) -> None:
        """Give both factors the same singular values in place, A B unchanged; unbalanced ones diverge in training."""
        A, B = balance(self.up.weight.double(), self.down.weight.double())
        self.up.weight.copy_(A)
        self.down.weight.copy_(B)

    def extra_repr(self) -> str:
        bias = getattr(self.up, "bias", None) is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


BYTES: tuple[type[Int8Linear] | type[Fp8Linear], ...] = (Int8Linear, Fp8Linear)
"""Linears that multiply bytes."""


def steps_of(layer: LowRankLinear, kind: type[Int8Linear] | type[Fp8Linear]) -> list[Any] | None:
    """The two steps of a layer whose factors are linears of that kind; None where they are not, or are listened to."""
    parts: list[nn.Module] = [layer.down, layer.up]
    found = [part for part in parts if isinstance(part, kind) and not has_hooks(part)]
    return [part.step for part in found] if len(found) == len(parts) else None
