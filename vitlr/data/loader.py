"""Images on disk to batches of tensors: timm's readers and transforms, with corrupt files counted, never replaced."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitlr.data import preprocessing
from vitlr.data.classes import label_images, num_classes, read_class_map
from vitlr.data.decoding import decode, listing
from vitlr.data.options import Preprocessing
from vitlr.data.readers import name_of, open_reader
from vitlr.errors import InputError
from vitlr.runtime.contexts import seeded
from vitlr.runtime.fields import keywords
from vitlr.runtime.machine import cores
from vitlr.runtime.modules import device_of
from vitlr.runtime.words import one_line, some

_logger = logging.getLogger(__name__)
_GOLDEN = (math.sqrt(5) - 1) / 2
_WORKERS_PAY = 256  # images below which starting worker processes costs more than it saves


class Loader:
    """Batches `(images [B, C, H, W] float32, labels [B] int64)` of a data set, the same at every pass.

    `images` counts the files, `skipped` the corrupt ones met so far: they are left out, never replaced, and named in
    one warning at the end of the pass. A pass in which no file could be read raises `InputError`. The order is fixed
    and any stretch of it is spread evenly over the sorted files (and so over the classes): see `spread`. `config` is
    the preprocessing in timm's words, `made` says it in one line. Labels are the model's classes where it
    `has_labels`, else the data set's own.
    """

    def __init__(
        self,
        dataset: _Images,
        path: str,
        batch_size: int,
        workers: int,
        pin_memory: bool,
        made: str,
        has_labels: bool,
    ) -> None:
        self.has_labels = has_labels
        self.dataset, self.path, self.batch_size, self.workers = dataset, path, batch_size, workers
        self.images, self.config, self.made = len(dataset), dataset.config, made
        self.corrupt: dict[int, str] = {}
        self._batches = DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # starting a pass then draws nothing from the caller's random state
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __repr__(self) -> str:
        return f"{self.images} images of {self.path}: {self.made}"

    @property
    def skipped(self) -> int:
        return len(self.corrupt)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        known = self.skipped
        read = 0
        for images, labels, corrupt in self._batches:
            self.corrupt.update(corrupt)
            if len(labels):
                read += len(labels)
                yield images, labels
        if not read:
            raise self._unreadable()
        self._warn(known)

    def share(self, number: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every `count`-th batch from the `number`-th on; one of which no file could be read is empty."""
        step, most = self.batch_size, self.images
        own = [p for start in range(number * step, most, count * step) for p in range(start, min(start + step, most))]
        for images, labels, corrupt in self.subset(own)._batches:
            self.corrupt.update(corrupt)
            yield images, labels

    def told(self, corrupt: Iterable[Mapping[int, str]], known: int) -> None:
        """End a pass that several shared, each with files that it could not read; `known` were so before."""
        for theirs in corrupt:
            self.corrupt.update(theirs)
        if self.skipped >= self.images:
            raise self._unreadable()
        self._warn(known)

    def _unreadable(self) -> InputError:
        return InputError(f"none of the {self.images} images in {self.path} could be read: {self._examples()}")

    @property
    def fingerprint(self) -> str:
        """Of the number of images, and of the names and labels of a thousand of them."""
        some_of = [(self.dataset.reader.filename(i), label) for i, label in self.dataset.chosen[:1000]]
        return f"{zlib.crc32(repr((self.images, some_of)).encode()):08x}"

    @property
    def listing(self) -> str:
        """A digest of the names and sizes of all images, which tells data sets of one name apart."""
        return listing(self.dataset.reader, [index for index, _ in self.dataset.chosen])

    def subset(self, positions: Sequence[int]) -> Loader:
        """The images at these positions of the fixed order, transformed as here."""
        return Loader(
            self.dataset.subset(positions),
            self.path,
            self.batch_size,
            self.workers,
            self._batches.pin_memory,
            self.made,
            self.has_labels,
        )

    def augmented(self, batches: Iterable[Sequence[tuple[int, int]]], **transform: Any) -> Iterator[Tensor]:
        """The images of `labelled`."""
        yield from (images for images, _ in self.labelled(batches, **transform))

    def labelled(
        self, batches: Iterable[Sequence[tuple[int, int]]], **transform: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For every list of (position, seed) a batch `[B, C, H, W]` under timm's training transform, and its labels.

        `transform` are the choices of `timm.data.create_transform` (scale, color_jitter, ...). They are drawn from the
        seeds alone, so the same lists give the same pixels with any number of workers. Files that cannot be read are
        left out, and named in one warning at the end.
        """
        known = self.skipped
        loader = DataLoader(
            self.dataset.augmented(**transform),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self._batches.pin_memory,
            generator=torch.Generator(),
        )
        try:
            for images, labels, corrupt in loader:
                self.corrupt.update(corrupt)
                yield images, labels
        finally:
            self._warn(known)

    def _warn(self, known: int) -> None:
        if self.skipped > known:
            count, examples = self.skipped, self._examples()
            _logger.warning("skipped %d of %d images that could not be read: %s", count, self.images, examples)

    def _examples(self) -> str:
        return some(list(self.corrupt.values()))


@keywords(Preprocessing)
def open_data(
    path: Any,
    model: nn.Module,
    *,
    class_map: str | os.PathLike[str] | Mapping[str, int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    skip: int = 0,
    split: str = "validation",
    need_labels: bool | None = False,
    data_config: Any = None,
    **changes: Any,
) -> Loader:
    """Open a folder, a .tar, `hfds/NAME` or a `datasets.Dataset`, with the evaluation transform of `model`.

    That is what `vitlr.data.data_config` finds, with `data_config` (a mapping in timm's words, a transformers image
    processor, a torchvision preset) and `mean`, `std`, `img_size`, `crop_pct`, `interpolation` before it; the loader
    says what was taken when it is printed, and to the log.

    `class_map` is a text file with one folder name a line in the model's class order (or {name: index}); images of
    other folders are left out and reported. `skip` and `limit` choose `order[skip : skip + limit]` of the fixed order.
    `split` names the split of an `hfds/` data set; of such a one columns are found by what they hold, images and
    classes, not by their names. With `need_labels` the classes must be the model's (None: where the
    data set has any, a folder without class folders has none). `workers` is the number of worker processes, 0 for none.

    Raises `InputError` for data that is missing, empty or unreadable, for classes that do not fit, and where nothing
    says how the model's images are made.
    """
    if batch_size < 1 or skip < 0 or (limit is not None and limit < 1) or (workers is not None and workers < 0):
        raise InputError(
            f"batch_size={batch_size}, limit={limit}, skip={skip}, workers={workers}: "
            "expected batch_size and limit >= 1, skip and workers >= 0"
        )
    data, path = path, name_of(path)
    config, made = preprocessing.described(model, data_config, **changes)
    classes = None
    if need_labels is not False or class_map is not None:
        classes = num_classes(model, config["input_size"])
    names_to_class = None if class_map is None else read_class_map(class_map, classes)
    reader, native, names = open_reader(data, split)
    need_labels = names.keys() != {""} if need_labels is None else need_labels
    labels = label_images(path, native, names, names_to_class, classes, need_labels)

    kept = [(i, label) for i in spread(len(labels)) if (label := labels[i]) is not None]
    chosen = kept[skip : None if limit is None else skip + limit]
    if not chosen:
        raise InputError(f"skip={skip} leaves none of the {len(kept)} images in {path}")
    dataset = _Images(reader, chosen, config)
    if workers is None:
        workers = 0 if len(chosen) < _WORKERS_PAY else min(4, cores())
    loader = Loader(dataset, path, batch_size, workers, device_of(model).type == "cuda", made, need_labels)
    _logger.info("%r", loader)
    return loader


def spread(count: int) -> list[int]:
    """A fixed order of range(count) of which any stretch is nearly evenly spread: sorted by frac(j * golden ratio).

    Files are sorted by class, so their first thousand may be a single class; the first thousand of this order are a
    fair sample, and two stretches that do not overlap share no image.
    """
    return sorted(range(count), key=lambda j: j * _GOLDEN % 1.0)


class _Images(Dataset[tuple[Any, Any, Any]]):
    """Decoded and transformed images; a file that cannot be read comes back as (None, its index, what is wrong)."""

    def __init__(self, reader: Any, chosen: Sequence[tuple[int, int]], config: Mapping[str, Any]) -> None:
        from timm.data import create_transform

        self.reader, self.chosen = reader, chosen  # (index in the reader, the model's class)
        self.config = config
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self.side = max(config["input_size"][-2:]) / (config["crop_pct"] or 1.0)
        self.transform = create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.chosen)

    def subset(self, positions: Sequence[int]) -> _Images:
        return _Images(self.reader, [self.chosen[i] for i in positions], self.config)

    def augmented(self, **transform: Any) -> _Augmented:
        return _Augmented(self, **transform)

    def __getitem__(self, item: int) -> tuple[Any, Any, Any]:
        return self.read(item, self.transform)

    def read(self, item: int, transform: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
        index, label = self.chosen[item]
        try:
            image = decode(self.reader, index, self.mode, self.side)
        except MemoryError:
            raise
        except Exception as cause:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            name = self.reader.filename(index) or f"image {index}"
            return None, index, f"{name:.200} ({one_line(cause, 120)})"
        return transform(image), label, None


class _Augmented(Dataset[tuple[Any, Any, Any]]):
    """The same images under timm's training transform, asked for by (position, seed)."""

    def __init__(self, images: _Images, **transform: Any) -> None:
        from timm.data import create_transform

        keys = ("input_size", "interpolation", "mean", "std")
        config = {key: images.config[key] for key in keys}
        if images.mode != "RGB":
            transform["color_jitter"] = 0.0
        self.images = images
        try:
            self.transform = create_transform(**config, is_training=True, **transform)
        except (AssertionError, IndexError, KeyError, ValueError) as cause:
            given = ", ".join(f"{key}={value!r}" for key, value in transform.items())
            raise InputError(f"timm makes no training transform of {given}: {one_line(cause, 120)}") from cause

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, Any, Any]:
        position, seed = item
        with seeded(seed):
            return self.images.read(position, self.transform)


def _collate(items: Sequence[tuple[Any, Any, Any]]) -> tuple[Tensor, Tensor, dict[int, str]]:
    images = [image for image, _, _ in items if image is not None]
    labels = [label for image, label, _ in items if image is not None]
    corrupt = {index: problem for image, index, problem in items if image is None}
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels, dtype=torch.int64), corrupt
