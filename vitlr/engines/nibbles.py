"""Codes in four bits, where that makes a file smaller: the same numbers to the bit.

    q = low + 16 high,  low from -8 to 7

Columns in which any code needs its `high` are there twice, as those of two bytes are (`engines.spoken`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

OPSET = 21  # of ONNX, the first whose DequantizeLinear takes INT4
_MOST = 0.25  # of the columns that may be there twice: so much more to multiply, for 3/8 of the bytes less


def split(codes: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes [N, K + R] from -8 to 7 of int8 ones [N, K], and the R columns whose `high` come last; None for too many.

    K + R is even: OpenVINO reads columns of odd length wrongly.
    """
    whole, K = codes.to(torch.int16), codes.shape[1]
    low = ((whole + 8) & 15) - 8
    high = (whole - low) >> 4
    twice = (high != 0).any(0)
    if (K + int(twice.sum())) % 2:
        twice[(~twice).nonzero()[:1]] = True
    places = twice.nonzero().flatten()
    if len(places) > _MOST * K or (K + len(places)) % 2 or int(high.max()) > 7:
        return None
    return torch.cat([low, high[:, places]], 1).to(torch.int8), places


def halve(graph: Any) -> int:
    """Store codes of weights that lie from -8 to 7 in INT4, in place; how many. `graph` is an `onnx_ir.Graph`."""
    import ml_dtypes
    import onnx_ir as ir

    count = 0
    for value in _weights(graph):
        codes = value.const_value.numpy()
        if codes.shape[0] % 2 == 0 and codes.min() >= -8 and codes.max() <= 7:
            value.const_value = ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=value.name)
            value.type = ir.TensorType(ir.DataType.INT4)
            count += 1
    return count


def _weights(graph: Any) -> Iterator[Any]:
    """Constants [K, N] of int8 that are dequantised, and nothing else is done with."""
    for value in list(graph.initializers.values()):
        codes, uses = value.const_value, list(value.uses())
        dequantised = uses and all(node.op_type == "DequantizeLinear" and place == 0 for node, place in uses)
        if dequantised and codes is not None and codes.dtype.name == "INT8" and len(codes.shape) == 2:
            yield value
