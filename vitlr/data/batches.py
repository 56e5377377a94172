"""What loaders give and what models take: tensors, tuples with labels, dicts of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.modules import like


def to_model(model: nn.Module, batch: Any) -> Any:
    """What the model is called with: the batch without labels, on the model's device, in its dtype."""
    wanted = like(model)
    if isinstance(batch, Mapping):
        return {key: _like(value, wanted) for key, value in batch.items() if key not in ("labels", "label")}
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(first, Tensor):
        raise InputError(f"the loader gave {type(first).__name__}, expected tensors, tuples or dicts of tensors")
    return _like(first, wanted)


def _like(value: Any, wanted: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(wanted.device, wanted.dtype if value.is_floating_point() else value.dtype)


def tensors(inputs: Any) -> list[Tensor]:
    values = inputs.values() if isinstance(inputs, dict) else [inputs]
    return [value for value in values if isinstance(value, Tensor)]


def count_images(inputs: Any) -> int:
    found = tensors(inputs)
    if not found or found[0].ndim == 0:
        raise InputError("the loader gave a batch without a batch dimension; stack images into [images, ...] tensors")
    return found[0].shape[0]


def one_image(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs[:1]


def image_shape(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: tuple(value.shape[1:]) for key, value in inputs.items() if isinstance(value, Tensor)}
    return tuple(inputs.shape[1:])


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's answer to what `to_model` gave."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)
