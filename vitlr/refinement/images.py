"""The proxy images: some to learn from, augmented or plain, and some held out to judge by."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitlr.data.loader import Loader, spread
from vitlr.data.seeds import Schedule, derived_seed
from vitlr.errors import InputError
from vitlr.runtime import processes
from vitlr.runtime.contexts import seeded

MIN_IMAGES = 32
_HELD_SHARE, _HELD_LEAST, _HELD_MOST = 0.15, 8, 512
_MIX, _CUT = 0.8, 1.0  # timm's usual mixup and cutmix


class Files:
    """Images of `vitlr.data.open_data`, decoded anew whenever they are asked for."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.order: Sequence[int] = range(loader.images)  # the loader's order is spread over the classes already

    def plain(self, positions: Sequence[int]) -> Iterator[Tensor]:
        yield from (images for images, _ in self.loader.subset(positions))

    def augmented(
        self, batches: Iterable[Sequence[tuple[int, int]]], scale: tuple[float, float], jitter: float
    ) -> Iterator[Tensor]:
        yield from self.loader.augmented(batches, scale=scale, color_jitter=jitter)


class Tensors:
    """Images of any other loader, read once and kept in memory; crops and flips then work on tensors."""

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Tensor):
            raise InputError("the loader is one tensor; give batches, such as [images] or images.split(50)")
        self.images = [image for batch in loader for image in _only_tensor(batch)]
        shapes = {tuple(image.shape) for image in self.images}
        if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
            raise InputError(f"the loader gives images of {sorted(shapes)}; refine expects [C, H, W] of one size")
        self.order = spread(len(self.images))

    def plain(self, positions: Sequence[int], batch_size: int = 50) -> Iterator[Tensor]:
        for start in range(0, len(positions), batch_size):
            yield torch.stack([self.images[i] for i in positions[start : start + batch_size]])

    def augmented(
        self, batches: Iterable[Sequence[tuple[int, int]]], scale: tuple[float, float], jitter: float
    ) -> Iterator[Tensor]:
        for batch in batches:
            yield torch.stack([_augment(self.images[i], seed, scale, jitter) for i, seed in batch])


class Proxy:
    """Images split once and for all: every seventh or so of a fixed spread order is held out.

    At least 32 images; 15 % of them, at least 8 and at most 512, are held out and never learnt from. `fingerprint` is
    that of the pixels held out. Raises `InputError` for too few images and for images that are all alike.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.source = Files(loader) if isinstance(loader, Loader) else Tensors(loader)
        order = list(self.source.order)
        if len(order) < MIN_IMAGES:
            raise InputError(
                f"the loader gives {len(order)} images, expected at least {MIN_IMAGES} to refine or try by; add some"
            )
        count = min(max(round(_HELD_SHARE * len(order)), _HELD_LEAST), _HELD_MOST)
        self.training, held = order[:-count], order[-count:]
        self.held = torch.cat(list(self.source.plain(held)))
        if len(self.held) < _HELD_LEAST:
            raise InputError(
                f"{len(self.held)} of {count} held-out images could be read, expected {_HELD_LEAST} or more"
            )
        sums = [zlib.crc32(image.contiguous().numpy().tobytes()) for image in self.held.cpu()]
        self.fingerprint, different = f"{zlib.crc32(repr(sums).encode()):08x}", len(set(sums))
        if different < _HELD_LEAST:
            raise InputError(
                f"{different} of the {len(self.held)} held-out images differ from each other, expected at least "
                f"{_HELD_LEAST}; give images that are not alike"
            )

    @property
    def count(self) -> int:
        """Images to learn from."""
        return len(self.training)

    def plain(self, limit: int) -> Iterator[Tensor]:
        """Batches of the first `limit` images to learn from, as the model sees them in use."""
        yield from self.source.plain(self.training[:limit])

    def own(self, limit: int) -> Iterator[Tensor]:
        """Those of them that are this process's."""
        yield from self.source.plain(processes.share(self.training[:limit]))

    def mixed(self, batch_size: int, seed: int, start: int, crop: float, jitter: float, mix: bool) -> Iterator[Tensor]:
        """Augmented batches without end, from step `start` on; step k gives the same batch however it is reached."""
        batches = self.source.augmented(Schedule(self.training, batch_size, seed, start), (crop, 1.0), jitter)
        for step, images in enumerate(batches, start):
            yield _mix(images, derived_seed(seed, "mix", step)) if mix else images


def _mix(images: Tensor, seed: int) -> Tensor:
    from timm.data import Mixup

    images = images[: len(images) // 2 * 2]  # timm mixes pairs
    with seeded(seed):
        mixed, _ = Mixup(_MIX, _CUT, label_smoothing=0, num_classes=2)(images, torch.zeros(len(images)).long())
    return mixed


def _augment(image: Tensor, seed: int, scale: tuple[float, float], jitter: float) -> Tensor:
    """Random resized crop, flip, brightness and contrast of normalised pixels; saturation would need raw colours."""
    from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
    from torchvision.transforms.v2.functional import horizontal_flip

    with seeded(seed):
        crop = RandomResizedCrop(image.shape[-2:], scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        image = crop(image)
        if torch.rand(()) < 0.5:
            image = horizontal_flip(image)
        shift, gain = (torch.rand(2) * 2 - 1) * jitter
        mean = image.mean()
        return (image - mean) * (1 + gain) + mean + shift * image.std()


def _only_tensor(batch: Any) -> Tensor:
    """The images of a batch: the tensor, the first item of a tuple, the only image tensor of a dict."""
    if isinstance(batch, Mapping):
        found = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 4]
        if len(found) != 1:
            raise InputError(f"the loader gives dicts with {len(found)} tensors [B, C, H, W]; refine expects one")
        return found[0]
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(first, Tensor):
        raise InputError(f"the loader gave {type(first).__name__}, expected tensors, tuples or dicts of tensors")
    return first
