"""Labelled batches that depend on nothing but seed and position, so that a run can go on from any update."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from vitlr.data.loader import Loader
from vitlr.data.seeds import Schedule, derived_seed
from vitlr.errors import InputError
from vitlr.runtime import processes
from vitlr.training.recipe import TrainRecipe

Batch = tuple[Tensor, Tensor]


class Files:
    """Images of `vitlr.data.open_data`, shuffled and augmented: timm's training transform under one seed an image."""

    def __init__(self, loader: Loader, recipe: TrainRecipe) -> None:
        self.loader, self.recipe = loader, recipe
        self.per_epoch = max(loader.images // loader.batch_size, 1)
        self.fingerprint = loader.fingerprint

    def start(self, at: int) -> Iterator[Batch]:
        """Batches without end, from the `at`-th on."""
        order = Schedule(range(self.loader.images), self.loader.batch_size, self.recipe.seed, at)
        return self.loader.labelled(
            order,
            scale=tuple(self.recipe.scale),
            ratio=tuple(self.recipe.ratio),
            hflip=self.recipe.hflip,
            color_jitter=self.recipe.color_jitter,
            auto_augment=self.recipe.aa,
            re_prob=self.recipe.reprob,
        )


class Passes:
    """Any loader with a length that can be gone through again and again; its order and augmentation are its own.

    Before every epoch the random generators, and the loader's `generator`, are set from (seed, epoch), and its or its
    sampler's `set_epoch` is called; before every batch the generators are set from (seed, batch). What draws from
    them, as `DataLoader` with `shuffle=True` does, repeats exactly.
    """

    def __init__(self, loader: Iterable[Any], recipe: TrainRecipe) -> None:
        try:
            self.per_epoch = len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise InputError(f"the loader is a {type(loader).__name__} without a length; pass a DataLoader") from None
        if self.per_epoch == 0:
            raise InputError("the loader has no batches; check the data")
        if processes.world() > 1 and isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise InputError(
                "the loader gives every process other images; give all the same batches: training shares them"
            )
        self.loader, self.seed = loader, recipe.seed
        self.fingerprint = None  # what such a loader holds is known only by reading it

    def start(self, at: int) -> Iterator[Batch]:
        """Batches without end, from the `at`-th on; those before it in its epoch are read and left."""
        epoch, skip = divmod(at, self.per_epoch)
        while True:
            batches = self._pass(epoch)
            for k in range(self.per_epoch):
                reseed(derived_seed(self.seed, "batch", epoch, k))
                batch = next(batches, None)
                if batch is None:
                    raise InputError(f"the loader gave {k} batches, expected {self.per_epoch}, its length")
                if k >= skip:
                    yield _pair(batch)
            epoch, skip = epoch + 1, 0

    def _pass(self, epoch: int) -> Iterator[Any]:
        owners: list[Any] = [self.loader, getattr(self.loader, "sampler", None)]
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
            if isinstance(getattr(owner, "generator", None), torch.Generator):
                owner.generator.manual_seed(derived_seed(self.seed, "epoch", epoch))
        reseed(derived_seed(self.seed, "epoch", epoch))
        return iter(self.loader)


def batches(loader: Iterable[Any], recipe: TrainRecipe) -> Files | Passes:
    """The loader as batches that can be entered anywhere. `InputError` for one that is empty or has no length."""
    return Files(loader, recipe) if isinstance(loader, Loader) else Passes(loader, recipe)


def reseed(seed: int) -> None:
    """Set Python's, numpy's and torch's generators on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _pair(batch: Any) -> Batch:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(t, Tensor) for t in batch[:2]):
        images, labels = batch[0], batch[1]
        whole = labels.ndim == 1 and not labels.is_floating_point()
        if len(labels) == len(images) and (whole or (labels.ndim == 2 and labels.is_floating_point())):
            return images, labels.long() if whole else labels
        raise InputError(
            f"labels are {list(labels.shape)} {labels.dtype}, expected [{len(images)}] integers or "
            f"[{len(images)}, classes] shares"
        )
    raise InputError("the loader yields no labels; expected batches (images, labels)")
