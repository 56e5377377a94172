"""What multiplies and shifts a norm's output goes into the norm: `(γ n(x) + β) m + t = (γ m) n(x) + (β m + t)`."""

from __future__ import annotations

from typing import Any

import numpy as np


def fold_norms(graph: Any) -> int:
    """Fold, in place, every Mul and Add of constants that alone reads a LayerNormalization; how many norms changed.

    In exact arithmetic the function is the same. `graph` is an `onnx_ir.Graph`.
    """
    norms = [node for node in graph if node.op_type == "LayerNormalization" and len(node.inputs) > 1]
    return sum(_fold(graph, norm) for norm in norms)


def _fold(graph: Any, norm: Any) -> bool:
    gamma = _constant(norm.inputs[1])
    if gamma is None or (len(norm.inputs) > 2 and _constant(norm.inputs[2]) is None):
        return False
    beta = _constant(norm.inputs[2]) if len(norm.inputs) > 2 else np.zeros_like(gamma)
    assert beta is not None
    gone: list[Any] = []
    scale, shift = gamma.astype(np.float64), beta.astype(np.float64)
    for op in ("Mul", "Add"):
        reader, number = _only_reader(gone[-1] if gone else norm, op)
        if reader is None or number is None or number.shape not in ((), gamma.shape):
            continue
        scale, shift = (scale * number, shift * number) if op == "Mul" else (scale, shift + number)
        gone.append(reader)
    if not gone:
        return False
    name = norm.outputs[0].name
    values = {f"{name}.scale": scale, f"{name}.shift": shift}
    for place, (key, array) in enumerate(values.items(), 1):
        value = _initializer(graph, key, array.astype(gamma.dtype))
        norm.resize_inputs(max(place + 1, len(norm.inputs)))
        norm.replace_input_with(place, value)
    gone[-1].outputs[0].replace_all_uses_with(norm.outputs[0], replace_graph_outputs=True)
    for node in reversed(gone):
        graph.remove(node, safe=True)
    return True


def _only_reader(node: Any, op: str) -> tuple[Any, np.ndarray | None]:
    """The one node that reads a node's output, if it is this operation with a constant, and the constant."""
    output = node.outputs[0]
    readers = [reader for reader, _ in output.uses()]
    if len(readers) != 1 or readers[0].op_type != op or output.is_graph_output():
        return None, None
    other = [value for value in readers[0].inputs if value is not output]
    return (readers[0], _constant(other[0])) if len(other) == 1 else (None, None)


def _constant(value: Any) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _initializer(graph: Any, name: str, array: np.ndarray) -> Any:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
    graph.register_initializer(value)
    return value
