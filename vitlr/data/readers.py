"""What timm reads, a folder, a .tar or a hub's data set, with every image's class in a fixed order."""

from __future__ import annotations

import importlib
import io
import logging
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlr.data.classes import natural
from vitlr.data.decoding import check_archive
from vitlr.data.places import hub_name
from vitlr.errors import InputError
from vitlr.runtime.words import one_line

_logger = logging.getLogger(__name__)
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LATER = (".avif", ".heic", ".heif", ".jp2", ".jxl")  # types of images that Python's table may lack


def name_of(data: Any) -> str:
    """A path as it is, a data set of the library `datasets` by the name that it has. `InputError` for anything else."""
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    if isinstance(data, Mapping):
        raise InputError(f"data is {len(data)} splits ({', '.join(map(str, data))}); give one of them")
    if not all(hasattr(data, key) for key in ("features", "cast_column", "__len__", "__getitem__")):
        raise InputError(
            f"data is a {type(data).__name__}, expected a folder of images, a .tar, hfds/NAME or a Dataset of datasets"
        )
    return str(getattr(getattr(data, "info", None), "dataset_name", None) or "a data set")


def open_reader(data: Any, split: str) -> tuple[Any, Sequence[int], dict[str, int]]:
    """The reader of `data`, the label of every image in the data set's own classes, and those classes by name."""
    from timm.data.readers import create_reader

    path = name_of(data)
    if not isinstance(data, (str, os.PathLike)):
        images = HubImages(data, path)
        return images, images.labels, images.classes
    hub = hub_name(path)
    if not hub and not Path(path).is_dir() and Path(path).suffix != ".tar":
        raise InputError(f"cannot read {path}: expected a folder of images, a .tar or hfds/NAME")
    if not hub and not Path(path).is_dir():
        check_archive(path)
    try:
        if hub:
            datasets: Any = importlib.import_module("datasets")
            images = HubImages(datasets.load_dataset(hub, split=split), hub)
            return images, images.labels, images.classes
        if Path(path).is_dir():
            with _extensions():
                reader = create_reader("", root=path)
            _tell_unread(path)
            reader.samples.sort()  # timm's natural order leaves a1 and a01 as the file system lists them
            return reader, *_numbered([target for _, target in reader.samples], reader.class_to_idx)
        # timm's index cache is a pickle beside the data: neither trusted nor written.
        with _extensions():
            reader = create_reader("", root=path, cache_tarinfo=False)
        return reader, *_numbered(reader.targets.tolist(), reader.class_name_to_idx)
    except MemoryError:
        raise
    except Exception as cause:  # empty folders and damaged archives surface as RuntimeError, ValueError, ReadError, ...
        hint = "install it with `pip install datasets`" if isinstance(cause, ImportError) else _empty_hint(path, cause)
        raise InputError(f"cannot read images from {path}: {hint}") from cause


class HubImages:
    """A table of `datasets`, whatever its columns are called: that of images, and of classes if it has one."""

    def __init__(self, table: Any, name: str) -> None:
        datasets: Any = importlib.import_module("datasets")

        kinds = table.features
        images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise InputError(f"none of its columns ({', '.join(kinds)}) holds images")
        named = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [column for column in _LABELS if isinstance(kinds.get(column), datasets.Value)]
        label = next((column for column in (*_LABELS, *named) if column in (named or plain)), None)
        if len(images) > 1 or len(named) > 1:
            _logger.warning("of the columns of %s, %s is read, with the classes of %s", name, images[0], label)
        table = table.with_format(None)  # without a transform of its owner's
        self.column = images[0]
        self.table = table.cast_column(self.column, datasets.Image(decode=False))
        found: list[Any] = [0] * len(table) if label is None else list(table[label])
        if label in named:
            self.classes = {word: index for index, word in enumerate(kinds[label].names)}
        else:
            self.classes, found = _classes_of(found, f"column {label} of {name}") if label else ({"": 0}, found)
        self.labels: list[int] = [-1 if target is None else target for target in found]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.table[index][self.column]
        file = io.BytesIO(image["bytes"]) if image.get("bytes") else open(image["path"], "rb")  # noqa: SIM115
        return file, self.labels[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """What the data set calls an image; its number where it does not."""
        return str(self.table[index][self.column].get("path") or f"image {index}")


_LABELS = ("label", "labels", "target", "class")  # what columns of classes are called


def _classes_of(found: Sequence[Any], where: str) -> tuple[dict[str, int], list[Any]]:
    """Classes by name, and the class of every row, of a column of plain numbers from 0 on, or of names."""
    given = [value for value in found if value not in (None, -1)]
    if not given:
        return {"": 0}, [0] * len(found)
    if all(isinstance(value, str) for value in given):
        classes = {word: index for index, word in enumerate(sorted(set(given), key=natural))}
        return classes, [classes.get(value) for value in found]
    if not all(isinstance(value, int) and 0 <= value < _MOST for value in given):
        raise InputError(f"{where} holds neither numbers of classes nor names")
    return {str(index): index for index in range(max(given) + 1)}, list(found)


_MOST = 2**20  # classes


@contextmanager
def _extensions() -> Iterator[None]:
    """Let timm list all types that are read; it keeps its own list, of three, for everybody."""
    from timm.data.readers import img_extensions

    before = img_extensions.get_img_extensions()
    img_extensions.set_img_extensions(EXTENSIONS)
    try:
        yield
    finally:
        img_extensions.set_img_extensions(before)


def _tell_unread(path: str) -> None:
    """A warning for images in a folder that are of a type which is not read."""
    unread: dict[str, int] = {}
    for _, _, files in os.walk(path):
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            image = ending in _LATER or (mimetypes.guess_type(name)[0] or "").startswith("image/")
            if image and ending not in EXTENSIONS:
                unread[ending] = unread.get(ending, 0) + 1
    if unread:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
        _logger.warning("left out images of types that are not read: %s; read are %s", kinds, ", ".join(EXTENSIONS))


def _numbered(targets: Sequence[int], names: Mapping[str, int]) -> tuple[list[int], dict[str, int]]:
    """Classes in timm's natural order; timm leaves ties as a set happens to give them."""
    ordered = sorted(names, key=natural)
    place = {names[name]: index for index, name in enumerate(ordered)}
    return [place[target] for target in targets], {name: index for index, name in enumerate(ordered)}


def _empty_hint(path: str, cause: Exception) -> str:
    if "unpack" in str(cause) or "Found 0 images" in str(cause):
        return f"there are none ({', '.join(EXTENSIONS)}) in it"
    return one_line(cause, 120)
