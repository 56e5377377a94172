"""A linear layer of integers: `y = W x + b`, `W_ij = q_ij · 2^((r_i + c_j) / 8)`, some columns in two bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._weightless import Weightless
from vitlr.runtime.compact import power

LARGEST = 127  # of a code
_RANGE = 1000  # of an exponent: 2^±125
BYTE = 64  # eighths of a power of two: what a byte further up counts
LARGEST_TWICE = 2**8 * LARGEST + 127  # of a code of two bytes


class QuantizedLinear(Weightless):
    """`y = W x + b` with `W_ij = q_ij · 2^((r_i + c_j) / 8)`: int8 codes q [N, K], a step for every row and column.

    `codes` [N, K] int8, `row_exponent` [N] and `column_exponent` [K] int16, `bias` [N] as in `nn.Linear`: integers,
    which `.to(dtype)` and autocast leave alone, so the weight is the same in every dtype up to its rounding. How many
    bits a weight takes is a matter of the file, which stores codes by their frequency (`runtime.coding`); in memory it
    takes eight. Columns whose input is now and then huge need finer steps than that: those at `twice` [k] int32 have
    `fine` [N, k] int8 on top, in steps of `2^((r_i + c_j) / 8 - 8)`. Without such columns both are None.
    No gradient reaches the codes; the input's is `Wᵀ g`, the bias's as ever.
    """

    codes: Tensor
    row_exponent: Tensor
    column_exponent: Tensor
    fine: Tensor | None
    twice: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        twice: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("row_exponent", torch.zeros(out_features, dtype=torch.int16, device=device))
        self.register_buffer("column_exponent", torch.zeros(in_features, dtype=torch.int16, device=device))
        fine = torch.zeros(out_features, twice, dtype=torch.int8, device=device) if twice else None
        self.register_buffer("fine", fine)
        self.register_buffer("twice", torch.arange(twice, dtype=torch.int32, device=device) if twice else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K], formed in float32 and rounded to `dtype`."""
        return weight(self, self.codes).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.dense_weight(dtype), bias)

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes: Tensor, row_exponent: Tensor, column_exponent: Tensor, bias: Tensor | None
    ) -> QuantizedLinear:
        """The layer of these codes (of two bytes where they pass ±127) and exponents, on their device.

        Raises `InputError` for what no such layer has.
        """
        N, K = codes.shape
        fine = twice = None
        if codes.dtype == torch.int16:
            codes, column_exponent, fine, twice = _bytes_of(codes, column_exponent)
        layer = cls(K, N, bias is not None, "meta", twice=0 if twice is None else len(twice))
        layer.codes, layer.row_exponent, layer.column_exponent = codes, row_exponent, column_exponent
        layer.fine, layer.twice = fine, twice
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
        k = 0 if self.twice is None else len(self.twice)
        expected = [("codes", (N, K), torch.int8), ("row_exponent", (N,), torch.int16)]
        expected += [("column_exponent", (K,), torch.int16)]
        expected += [("fine", (N, k), torch.int8), ("twice", (k,), torch.int32)] if k else []
        for part, shape, dtype in expected:
            found = getattr(self, part)
            if found.shape != shape or found.dtype != dtype:
                raise InputError(f"{name}: {part} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        for part in ("row_exponent", "column_exponent"):
            found = getattr(self, part)
            if not found.is_meta and int(found.int().abs().max()) > _RANGE:
                raise InputError(f"{name}: {part} reaches {int(found.int().abs().max())}, expected at most {_RANGE}")
        if self.twice is not None and not self.twice.is_meta:
            ends = torch.tensor([-1, K], device=self.twice.device)
            if bool((torch.cat([ends[:1], self.twice, ends[1:]]).diff() <= 0).any()):
                raise InputError(f"{name}: twice is no rising list of columns from 0 to {K - 1}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Copied, integers of another dtype would be read as other numbers, without a word.
        for part in ("codes", "row_exponent", "column_exponent", "fine", "twice"):
            given, own = state_dict.get(prefix + part), getattr(self, part)
            if isinstance(given, Tensor) and own is not None and given.dtype != own.dtype:
                raise InputError(f"{prefix}{part} is {given.dtype}, expected {own.dtype}")
        fine, twice = (state_dict.get(prefix + part) for part in ("fine", "twice"))
        if isinstance(fine, Tensor) and isinstance(twice, Tensor):  # how many columns these are is the state's
            if fine.shape != (self.out_features, len(twice)) or len(twice) > self.in_features:
                raise InputError(f"{prefix}fine is {list(fine.shape)} for {len(twice)} columns in two bytes")
            self.fine, self.twice = (torch.empty_like(part, device=self.codes.device) for part in (fine, twice))
        elif fine is None and twice is None:
            self.fine = self.twice = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def weight(layer: Any, codes: Tensor) -> Tensor:
    """W [N, K] in float32 of codes, whole numbers of any dtype, and of what else a layer of integers holds."""
    columns, rows = power(layer.column_exponent), power(layer.row_exponent)[:, None]
    W = codes * columns * rows  # N + K powers, not N K
    if layer.fine is None:
        return W
    lower = layer.fine * power(layer.column_exponent[layer.twice] - BYTE) * rows
    return W.index_add(1, layer.twice, lower)


def _bytes_of(codes: Tensor, column_exponent: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes of one byte, exponents of their columns, and the lower byte of columns that need one, with their places."""
    twice = (codes.int().abs() > LARGEST).any(0).nonzero().flatten()
    if not len(twice):
        return codes.to(torch.int8), column_exponent, None, None
    whole, exponent = codes.int(), column_exponent.clone()
    upper = (whole[:, twice] + 2**7) >> 8
    lower = (whole[:, twice] - (upper << 8)).to(torch.int8)
    whole[:, twice] = upper
    exponent[twice] += BYTE
    return whole.to(torch.int8), exponent, lower, twice.to(torch.int32)


def step(row_exponent: Tensor, column_exponent: Tensor) -> Tensor:
    """`2^((r_i + c_j) / 8)` [N, K] in float32: what one more in a code adds to the weight."""
    return power(row_exponent[:, None].to(torch.int32) + column_exponent)
