"""What loaders give and what models take: tensors, tuples with labels, dicts of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.modules import like


def to_model(model: nn.Module, batch: Any) -> Any:
    """What the model is called with: the batch without labels, on the model's device, in its dtype."""
    return on_device(model, for_model(model, batch))


def for_model(model: nn.Module, batch: Any) -> Any:
    """The same where the batch is: whoever reads it there need not wait for the model's device."""
    dtype = like(model).dtype
    if isinstance(batch, Mapping):
        return {key: _in(dtype, value) for key, value in batch.items() if key not in LABELS}
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(first, Tensor):
        raise InputError(f"the loader gave {type(first).__name__}, expected tensors, tuples or dicts of tensors")
    return _in(dtype, first)


def on_device(model: nn.Module, inputs: Any) -> Any:
    """What `for_model` gave, on the model's device."""
    device = like(model).device
    if isinstance(inputs, dict):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs.to(device)


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


LABELS = ("labels", "label")  # what dicts call them


def labels_of(batch: Any) -> Tensor | None:
    """The labels that a batch comes with, None where it has none: the second item of a tuple, an entry of a dict."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABELS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, (list, tuple)) and found and all(type(label) is int for label in found):
        return torch.tensor(found)
    return found if isinstance(found, Tensor) else None


def tensors(inputs: Any) -> list[Tensor]:
    values = inputs.values() if isinstance(inputs, dict) else [inputs]
    return [value for value in values if isinstance(value, Tensor)]


def count_images(inputs: Any) -> int:
    found = tensors(inputs)
    if not found or found[0].ndim == 0:
        raise InputError("the loader gave a batch without a batch dimension; stack images into [images, ...] tensors")
    return found[0].shape[0]


def one_image(inputs: Any) -> Any:
    return first_images(inputs, 1)


def first_images(inputs: Any, count: int) -> Any:
    """The first images of a batch."""
    if isinstance(inputs, dict):
        return {key: value[:count] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs[:count]


def image_shape(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: tuple(value.shape[1:]) for key, value in inputs.items() if isinstance(value, Tensor)}
    return tuple(inputs.shape[1:])


def image_dtype(inputs: Any) -> Any:
    """The name of the dtype of what `to_model` gave, of every tensor by name for a dict."""
    if isinstance(inputs, dict):
        return {key: image_dtype(value) for key, value in inputs.items() if isinstance(value, Tensor)}
    return str(inputs.dtype).removeprefix("torch.")


def noise_image(model: nn.Module, image: Any) -> Any:
    """One image of noise, always the same, for `image` = its shape and dtype; integers are below 3."""
    shape, dtype = image
    if isinstance(shape, Mapping):
        return {key: noise_image(model, (shape[key], (dtype or {}).get(key))) for key in shape}
    wanted, generator = like(model), torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype or "float32")
    if not kind.is_floating_point:
        return torch.randint(0, 2 if kind == torch.bool else 3, (1, *shape), generator=generator).to(
            wanted.device, kind
        )
    return torch.randn(1, *shape, generator=generator).to(wanted.device, wanted.dtype)


def noise_images(model: nn.Module, image: Any, count: int) -> Any:
    """A batch of so many of it."""
    found = noise_image(model, image)
    if isinstance(found, dict):
        return {key: torch.cat([value] * count) for key, value in found.items()}
    return torch.cat([found] * count)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's answer to what `to_model` gave."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an answer, through tuples, dicts and objects that hold some."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        for item in vars(value).values():
            yield from tensors_in(item) if isinstance(item, (Tensor, tuple, list)) else ()


def first_tensor(answer: Any) -> Tensor:
    """What a model answers: its `logits` by name, else the first tensor of a tuple or dict that has a row an image.

    Losses in front (no dimension, or one as several devices leave it) are passed over where anything else is there, and
    so is None. One number an image, `[images]`, is a row of one.
    """
    if isinstance(answer, Tensor):
        if not answer.ndim:
            raise InputError(
                "the model returned one number for all images, expected a row an image; pass output_fn= to pick one"
            )
        return answer if answer.ndim > 1 else answer.unsqueeze(1)
    named = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(named, Tensor):
        return first_tensor(named)
    values = list(answer.values()) if hasattr(answer, "values") else answer
    for least in (2, 1):
        for value in values if isinstance(values, (list, tuple)) else ():
            if value is not None and not (isinstance(value, Tensor) and value.ndim < least):
                return first_tensor(value)
    raise InputError(f"the model returned {type(answer).__name__}, expected a tensor; pass output_fn= to pick one")
