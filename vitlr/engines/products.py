"""Which products of an ONNX graph are of bytes: MatMuls and Gemms both of whose inputs are dequantised."""

from __future__ import annotations

from typing import Any

_BYTES = ("INT8", "UINT8")


def products_of_bytes(graph: Any) -> int:
    """How many MatMuls and Gemms of an `onnx_ir.Graph` read two DequantizeLinears of bytes."""
    products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    return sum(all(_is_of_bytes(value) for value in node.inputs[:2]) for node in products)


def _is_of_bytes(value: Any) -> bool:
    """Whether a value is dequantised from bytes: constants, or what was quantised just before."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return False
    codes = node.inputs[0]
    made = codes.producer()
    constant = codes.const_value is not None and codes.const_value.dtype.name in _BYTES
    return constant or (made is not None and made.op_type == "QuantizeLinear")
