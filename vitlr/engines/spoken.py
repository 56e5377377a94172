"""Layers of integers said in ONNX's words: codes that are dequantised, and inputs that are quantised before that.

    Int8Linear        W q, q = round(m ⊙ x + t)      x m + t -> QuantizeLinear -> DequantizeLinear -> MatMul codes
    QuantizedLinear   W_ij = q_ij 2^((r_i + c_j)/8)  x 2^(c/8) -> MatMul codes

Codes stay one byte each in the file, half of one where nearly all of a layer fit (`engines.nibbles`), and every row
has its scale. What multiplies and shifts x stands alone, so that it can go into a norm before (`engines.norms`);
inputs are quantised in steps of one, by the whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.engines.nibbles import split
from vitlr.nn import Int8Linear, QuantizedLinear
from vitlr.nn.quantized_linear import BYTE
from vitlr.runtime.compact import power
from vitlr.runtime.modules import swap


class SpokenInt8(nn.Module):
    """An `Int8Linear` with its input quantised to u8 and its weight, s8 in rows, dequantised; for export only."""

    codes: Tensor
    scale: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    wide: Tensor | None
    further: Tensor | None
    step: Tensor
    zero: Tensor

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", layer.codes.t().contiguous())
        for name in ("scale", "bias"):
            self.register_buffer(name, getattr(layer, name).clone())
        for name in ("multiplier", "shift"):
            self.register_buffer(name, getattr(layer, name)[: layer.in_features].clone())
        wide = None if layer.wide is None else layer.wide.long()
        self.register_buffer("wide", wide)  # its columns count on where the ones before end
        self.register_buffer("further", None if wide is None else layer.shift[layer.in_features :] - layer.shift[wide])
        self.register_buffer("step", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.multiplier + self.shift
        if self.wide is not None and self.further is not None:
            x = torch.cat([x, x[..., self.wide] + self.further], -1)
        q = _said("QuantizeLinear", [x, self.step, self.zero], x, torch.uint8)
        x = _said("DequantizeLinear", [q, self.step, self.zero], x, torch.float32)
        return x @ _weight(self.codes, self.scale) + self.bias


class SpokenCodes(nn.Module):
    """A `QuantizedLinear` whose codes stay bytes, or become halves of one; columns of two are two columns each.

    For export only.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    multiplier: Tensor
    columns: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, columns = layer.codes, power(layer.column_exponent)
        places = None
        if layer.fine is not None and layer.twice is not None:
            codes = torch.cat([codes, layer.fine], 1)
            columns = torch.cat([columns, power(layer.column_exponent[layer.twice] - BYTE)])
            places = torch.cat([torch.arange(layer.in_features), layer.twice.long()])
        fours = split(codes)
        self.of_four_bits = fours is not None
        if fours is not None:
            codes, again = fours
            columns = torch.cat([columns, 16 * columns[again]])
            if len(again):
                places = torch.arange(layer.in_features) if places is None else places
                places = torch.cat([places, places[again]])
        self.register_buffer("columns", places)
        self.register_buffer("codes", codes.t().contiguous())
        self.register_buffer("scale", power(layer.row_exponent))
        self.register_buffer("multiplier", columns)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        y = (x * self.multiplier) @ _weight(self.codes, self.scale)
        return y if self.bias is None else y + self.bias


def halves(model: nn.Module) -> bool:
    """Whether any codes of a model that speaks so fit in four bits."""
    return any(isinstance(module, SpokenCodes) and module.of_four_bits for module in model.modules())


def speak(model: nn.Module) -> int:
    """Put these in place of the layers of integers, in place; how many of them multiply bytes."""
    kinds: Mapping[type[nn.Module], Any] = {Int8Linear: SpokenInt8, QuantizedLinear: SpokenCodes}
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) in kinds:
            swap(model, name, kinds[type(module)](module))
            count += isinstance(module, Int8Linear)
    return count


def _weight(codes: Tensor, scale: Tensor) -> Tensor:
    """[K, N] in float32 of int8 codes and a scale for every column."""
    return _said("DequantizeLinear", [codes, scale], codes, torch.float32, axis=1)


def _said(op: str, inputs: Sequence[Tensor], like: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=like.shape)
