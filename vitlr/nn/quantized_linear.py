"""A linear layer of integers: `y = W x + b`, `W_ij = q_ij · 2^((r_i + c_j) / 8)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.compact import power

LARGEST = 127  # of a code
_RANGE = 1000  # of an exponent: 2^±125


class QuantizedLinear(nn.Module):
    """`y = W x + b` with `W_ij = q_ij · 2^((r_i + c_j) / 8)`: int8 codes q [N, K], a step for every row and column.

    `codes` [N, K] int8, `row_exponent` [N] and `column_exponent` [K] int16, `bias` [N] as in `nn.Linear`: integers,
    which `.to(dtype)` and autocast leave alone, so the weight is the same in every dtype up to its rounding. How many
    bits a weight takes is a matter of the file, which stores codes by their frequency (`runtime.coding`); in memory it
    takes eight. No gradient reaches the codes; the input's is `Wᵀ g`, the bias's as ever.
    """

    codes: Tensor
    row_exponent: Tensor
    column_exponent: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("row_exponent", torch.zeros(out_features, dtype=torch.int16, device=device))
        self.register_buffer("column_exponent", torch.zeros(in_features, dtype=torch.int16, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K], each entry rounded once to `dtype`."""
        return (self.codes * step(self.row_exponent, self.column_exponent)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dense_weight(dtype), bias)

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes: Tensor, row_exponent: Tensor, column_exponent: Tensor, bias: Tensor | None
    ) -> QuantizedLinear:
        """The layer of these codes and exponents, on their device. Raises `InputError` for what no such layer has."""
        N, K = codes.shape
        layer = cls(K, N, bias is not None, "meta")
        layer.codes, layer.row_exponent, layer.column_exponent = codes, row_exponent, column_exponent
        layer.bias = None if bias is None else nn.Parameter(bias)
        layer.check("codes")
        return layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer of the same function, in the bias's dtype, else float32; same device and mode."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", dtype)
        linear.weight = nn.Parameter(self.dense_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def check(self, name: str) -> None:
        """Raise `InputError` for codes, exponents and shapes that rounding never gives."""
        N, K = self.out_features, self.in_features
        expected = (("codes", (N, K), torch.int8), ("row_exponent", (N,), torch.int16))
        for part, shape, dtype in (*expected, ("column_exponent", (K,), torch.int16)):
            found = getattr(self, part)
            if found.shape != shape or found.dtype != dtype:
                raise InputError(f"{name}: {part} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        for part in ("row_exponent", "column_exponent"):
            found = getattr(self, part)
            if not found.is_meta and int(found.abs().max()) > _RANGE:
                raise InputError(f"{name}: {part} reaches {int(found.abs().max())}, expected at most {_RANGE}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Copied, integers of another dtype would be read as other numbers, without a word.
        for part in ("codes", "row_exponent", "column_exponent"):
            given, own = state_dict.get(prefix + part), getattr(self, part)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                raise InputError(f"{prefix}{part} is {given.dtype}, expected {own.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def step(row_exponent: Tensor, column_exponent: Tensor) -> Tensor:
    """`2^((r_i + c_j) / 8)` [N, K] in float32: what one more in a code adds to the weight."""
    return power(row_exponent[:, None].to(torch.int32) + column_exponent)
