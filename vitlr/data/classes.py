"""Which class of the model an image belongs to: class maps, and what is said where the classes do not fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.data.batches import first_tensor
from vitlr.errors import InputError, VitlrError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import like, unwrapped
from vitlr.runtime.places import is_file
from vitlr.runtime.words import one_line, some

_MOST = 2**24  # bytes of a class map; that of ImageNet-21k has 200 KiB
_logger = logging.getLogger(__name__)


def num_classes(model: nn.Module, size: Sequence[int]) -> int | None:
    """How many classes `model` tells apart, asked of its answer to one blank image `size`: 0 without a classifier.

    What it says of itself goes stale when a head is put in its place. None where the answer is no row of numbers.
    """
    inner = unwrapped(model)
    head = getattr(inner, "get_classifier", None)
    if getattr(inner, "num_classes", None) == 0 and callable(head) and isinstance(head(), nn.Identity):
        return 0
    like_model = like(model)
    image = torch.zeros(1, *size, dtype=like_model.dtype, device=like_model.device)
    try:
        with evaluation_mode(model), torch.no_grad():
            answer = first_tensor(model(image))
    except VitlrError:
        return None
    except Exception as cause:  # whatever a forward raises on an image that it cannot take
        raise InputError(
            f"{type(model).__qualname__} cannot take an image {list(image.shape)}: {one_line(cause, 120)}"
        ) from cause
    return answer.shape[1] if answer.ndim == 2 else None


def read_class_map(class_map: str | os.PathLike[str] | Mapping[str, int], classes: int | None) -> dict[str, int]:
    """Folder names to indices, from a file with one name a line; `InputError` unless there are `classes`, if any."""
    if isinstance(class_map, Mapping):
        where, found = "the class map", dict(class_map)
        lines = len(found)
    else:
        where = f"class map {os.fspath(class_map)}"
        if not is_file(Path(class_map)) or Path(class_map).stat().st_size > _MOST:
            raise InputError(f"cannot read {where}: expected a text file, one class (folder) name a line")
        try:
            names = [line.strip() for line in Path(class_map).read_text(encoding="utf-8").rstrip().splitlines()]
        except (OSError, UnicodeDecodeError) as cause:
            raise InputError(f"cannot read {where}: expected a text file, one class (folder) name a line") from cause
        lines, found = len(names), {name: index for index, name in enumerate(names)}
        if len(found) != lines:
            twice = next(name for index, name in enumerate(names) if found[name] != index)
            raise InputError(f"{where} names {twice!r} twice; expected one line for each class")
    if classes and lines != classes:  # a model without a head has no classes of its own
        raise InputError(f"{where} has {lines} classes, the model {classes}; expected one line for each, in its order")
    if any(not isinstance(index, int) or not 0 <= index < lines for index in found.values()):
        raise InputError(f"{where} maps to indices outside 0..{lines - 1}")
    return found


def natural(name: str) -> tuple[Any, str]:
    """timm's order of names, numbers in them by value; ties (a1 and a01) by letters."""
    from timm.utils.misc import natural_key

    return natural_key(name), name


def label_images(
    path: str,
    native: Sequence[int],
    names: Mapping[str, int],
    class_map: Mapping[str, int] | None,
    classes: int | None,
    need_labels: bool,
) -> list[int | None]:
    """The model's class of every image; None for an image that the class map leaves out.

    `native` holds the data set's own class of every image and `names` those classes by name. Raises `InputError` where
    labels are needed and the classes are not the model's, and where the class map names none of them.
    """
    if not native:
        raise InputError(f"cannot read images from {path}: there are none in it")
    if need_labels and names.keys() == {""}:
        raise InputError(f"{path} has no classes: expected a folder a class; beside a reference no labels are needed")
    if need_labels and classes == 0:
        raise InputError("the model has no classifier (num_classes=0), so its accuracy cannot be measured")
    if class_map is None:
        if need_labels and classes is not None and len(names) != classes:
            raise InputError(
                f"{path} has {len(names)} classes, the model has {classes}; give a class map (--class-map FILE): "
                "one folder name a line, in the model's class order"
            )
        if need_labels and list(names) != sorted(names) and list(names) == sorted(names, key=natural):
            first = next(a for a, b in zip(names, sorted(names), strict=True) if a != b)
            _logger.warning(
                "the classes of %s are numbered as timm does (2 before 10); by letters, as torchvision does, they "
                "would be others from %r on: a class map says which order is the model's",
                path,
                first,
            )
        return list(native)
    to_model = {index: class_map.get(name) for name, index in names.items()}
    labels = [to_model.get(index) for index in native]
    left_out = [name for name in names if name not in class_map]
    if all(label is None for label in labels):
        raise InputError(
            f"the class map names none of the {len(names)} folders of {path} ({some(left_out)}); "
            "expected one folder name a line, in the model's class order"
        )
    if left_out:
        _logger.warning(
            "left out %d images of %d folders that the class map does not name: %s",
            sum(label is None for label in labels),
            len(left_out),
            some(left_out),
        )
    return labels
