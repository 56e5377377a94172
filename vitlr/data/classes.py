"""Which class of the model an image belongs to: class maps, and what is said where the classes do not fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from vitlr.errors import InputError
from vitlr.runtime.places import is_file
from vitlr.runtime.words import some

_MOST = 2**24  # bytes of a class map; that of ImageNet-21k has 200 KiB
_logger = logging.getLogger(__name__)


def num_classes(model: nn.Module) -> int | None:
    """How many classes `model` tells apart: timm's num_classes or transformers' config.num_labels; None if unsaid."""
    for holder, name in ((model, "num_classes"), (getattr(model, "config", None), "num_labels")):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return found
    return None


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
    if need_labels and classes == 0:
        raise InputError("the model has no classifier (num_classes=0), so its accuracy cannot be measured")
    if class_map is None:
        if need_labels and classes is not None and len(names) != classes:
            raise InputError(
                f"{path} has {len(names)} classes, the model has {classes}; give a class map (--class-map FILE): "
                "one folder name a line, in the model's class order"
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
