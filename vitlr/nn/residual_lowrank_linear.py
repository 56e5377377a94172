"""A linear layer stored as two thin ones and a compact residual: `y = A (B x) + R x + b`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._plain import is_plain, is_transformed
from vitlr.nn._weightless import Weightless
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.ops.dispatch.autocast import compute_dtype
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_residual_linear as op
from vitlr.ops.layers.codes import ZERO, code_dtype, code_shape, dequantise, groups

if TYPE_CHECKING:
    from vitlr.ops.linalg.residuals import Measured

GROUP = 64


class ResidualLowRankLinear(Weightless):
    """`y = A (B x) + R x + b`: A = `up.weight` [N, r], B = `down.weight` [r, K], b = `up.bias` [N], R in `codes`.

    `residual` is the form of R [N, K]: int8, int4 or fp8 with a `scale` for every `group_size` columns of a row, or
    blockdiag with blocks of `group_size` columns (`ops.layers.codes` has the layouts). Quantised codes are buffers of
    integers, which `.to(dtype)` and autocast leave alone; blocks are a parameter. Children and dispatch are those of
    `LowRankLinear`. Raises InputError for a rank outside 1..min(K, N) and a form or group size that does not fit.
    """

    codes: Tensor
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        residual: str = "int8",
        group_size: int = GROUP,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op.check_form("ResidualLowRankLinear", out_features, in_features, residual, group_size)
        factors = LowRankLinear(in_features, out_features, rank, bias, device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.residual = residual
        self.group_size = min(group_size, in_features)
        self.down, self.up = factors.down, factors.up
        dtype = self.up.weight.dtype
        shape = code_shape(residual, out_features, in_features, self.group_size)
        codes = torch.full(shape, ZERO.get(residual, 0), dtype=code_dtype(residual, dtype), device=device)
        if residual == "blockdiag":
            self.codes = nn.Parameter(codes)
            self.register_buffer("scale", None)
        else:
            self.register_buffer("codes", codes)
            shape = (out_features, groups(in_features, self.group_size))
            self.register_buffer("scale", torch.ones(shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.down, self.up
        if has_kernels(op.OP) and not is_transformed() and is_plain(B) and is_plain(A):
            N, K, bias = self.out_features, self.in_features, A.bias
            if kernel_chosen(op.OP, x, K, N, self.rank, self.residual, self.group_size, bias is not None):
                rest = (self.codes, self.scale, bias, self.residual, self.group_size)
                return op.lowrank_residual_linear(x, B.weight, A.weight, *rest)
        scale = None if self.scale is None else self.scale.to(compute_dtype(x))  # as the op rounds it under autocast
        return A(B(x)) + op.residual(x, self.codes, scale, self.residual, self.group_size)

    @property
    def bias(self) -> Tensor | None:
        """That of the second factor, [N], or None: a parent may ask whether there is one."""
        return self.up.bias

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        residual: str = "int8",
        group_size: int = GROUP,
        statistics: Measured | None = None,
        dtype: torch.dtype | None = None,
    ) -> ResidualLowRankLinear:
        """The layer `W ≈ A B + R`, A B and R refined in turns (`vitlr.ops.linalg.residuals`), solved in fp64.

        `statistics`, one layer of `vitlr.calibrate`'s, weighs errors by what the layer sees; without, all weights count
        alike. Same device, mode and, unless `dtype` says another, dtype as `linear`: from fp32 weights to a bf16 layer
        rounds once. Raises InputError for a rank, form or group size that does not fit, other statistics, or what is no
        linear; NumericalError for NaN or Inf.
        """
        from vitlr.ops.linalg.residuals import solve_parts  # it brings the solver, which few layers need

        if not isinstance(linear, nn.Linear):
            raise InputError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
        W, bias, dtype = linear.weight, linear.bias, dtype or linear.weight.dtype
        layer = cls(
            linear.in_features, linear.out_features, rank, residual, group_size, bias is not None, "meta", dtype
        )
        parts = solve_parts(W, rank, residual, layer.group_size, dtype, statistics)
        # Contiguous, as a file gives them back: BLAS may sum a transposed factor in another order.
        layer.down.weight, layer.up.weight = (nn.Parameter(t.contiguous()) for t in (parts.B, parts.A))
        if bias is not None:
            layer.up.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        layer.codes = nn.Parameter(parts.codes) if residual == "blockdiag" else parts.codes
        layer.scale = parts.scale
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function, `W = A B + R` in fp64; same device, dtype and mode.

        Raises InputError if a child is no longer a plain linear.
        """
        linear = LowRankLinear.to_linear(self)  # type: ignore[arg-type]  # it reads the children, which are the same
        W = self.up.weight.double() @ self.down.weight.double() + self.dense_residual().double()
        linear.weight = nn.Parameter(W.to(linear.weight.dtype))
        return linear

    def dense_residual(self) -> Tensor:
        """R [N, K] as it is multiplied, in the dtype of the scale or of the blocks."""
        return dequantise(self.codes, self.scale, self.residual, self.group_size, self.in_features)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Copied or assigned, codes of another dtype would be read as other numbers, without a word.
        codes = state_dict.get(f"{prefix}codes")
        if isinstance(codes, Tensor) and self.residual != "blockdiag" and codes.dtype != self.codes.dtype:
            raise InputError(f"{prefix}codes is {codes.dtype}, expected {self.codes.dtype} for {self.residual}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        bias = getattr(self.up, "bias", None) is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"residual={self.residual}, group_size={self.group_size}, bias={bias}"
        )
