"""Calibration by several processes: who takes which batch, and how the sums of all become one.

Batches are dealt out in rounds, one to each process, so that after every round what was measured is a stretch from the
first image on: statistics cut short can be gone on from by any number of processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from vitlr.calibration.statistics import Statistics
from vitlr.calibration.sums import SUMS
from vitlr.data.batches import one_image, tensors_in, to_model
from vitlr.data.loader import Loader
from vitlr.errors import InputError
from vitlr.runtime import processes

NOTHING: Any = object()  # in the place of a batch, in rounds where others have one and this process has none


class Share:
    """The batches of one process among several, or `NOTHING`.

    A `Loader` reads only these; of any other all processes see all batches, which must be the same for all, unless its
    sampler is a `DistributedSampler`. `begun` is called when a batch is there.
    """

    def __init__(self, loader: Iterable[Any], begun: Callable[[], None] = lambda: None) -> None:
        self.loader, self.begun = loader, begun

    @classmethod
    def of(cls, loader: Iterable[Any]) -> Share:
        """Of a loader, which may be one already."""
        return loader if isinstance(loader, Share) else cls(loader)

    def __iter__(self) -> Iterator[Any]:
        if processes.world() == 1:
            for batch in self.loader:
                self.begun()
                yield batch
            return
        known, batches = getattr(self.loader, "skipped", 0), iter(self._own())
        while True:
            batch = next(batches, NOTHING)
            if not any(processes.gather(batch is not NOTHING)):
                break
            self.begun()
            yield batch
        if isinstance(self.loader, Loader):
            self.loader.told(processes.gather(self.loader.corrupt), known)

    def _own(self) -> Iterable[Any]:
        number, count = processes.rank(), processes.world()
        if isinstance(self.loader, Loader):
            return self.loader.share(number, count)
        if isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            return self.loader
        batches = iter(self.loader)
        first = next(batches, NOTHING)
        if len(set(processes.gather(_digest(first)))) > 1:
            raise InputError(
                "the loader gives every process other images, so some would count twice and some not at all; let it "
                "shuffle by a generator with a fixed seed, or give it a DistributedSampler"
            )
        return islice(chain([] if first is NOTHING else [first], batches), number, None, count)


def example(model: nn.Module, inputs: Any) -> Any:
    """One image of the first process that has any, for all to look at the same; None where none has."""
    mine = None if inputs is None else one_image(inputs)
    if processes.world() == 1:
        return mine
    having = processes.gather(mine is not None)
    if not any(having):
        return None
    here = {key: _here(value) for key, value in mine.items()} if isinstance(mine, dict) else _here(mine)
    return to_model(model, processes.from_rank(having.index(True), here))


def together(stats: Statistics) -> None:
    """Everything that the processes have summed, in process 0's statistics; those of the others begin anew."""
    if processes.world() == 1:
        return
    for layer in stats.layers.values():
        for key, tensor in layer.own():
            processes.sum_in_order([tensor], SUMS[key].join)
    tokens = [layer.tokens for layer in stats.layers.values()]
    found = processes.gather((stats.images, tokens, _on_host(stats.others), stats.answer))
    stats.answer = next((answer for *_, answer in found if answer), "")
    if not processes.first():
        begin_anew(stats)
        return
    stats.images = sum(images for images, *_ in found)
    for layer, *counts in zip(stats.layers.values(), *(tokens for _, tokens, *_ in found), strict=True):
        layer.tokens = sum(counts)
    stats.others = {}
    for _, _, others, _ in found:
        for name, lost in others.items():
            stats.others[name] = stats.others[name] + lost if name in stats.others else lost


def begin_anew(stats: Statistics) -> None:
    """Let statistics be of no image."""
    stats.images, stats.others = 0, {}
    for layer in stats.layers.values():
        layer.tokens = 0
        for key, tensor in layer.own():
            tensor.fill_(SUMS[key].start)


def everywhere(stats: Statistics) -> None:
    """Process 0's statistics, in all processes."""
    if processes.world() == 1:
        return
    processes.spread(tensor for layer in stats.layers.values() for _, tensor in layer.own())
    tokens = [layer.tokens for layer in stats.layers.values()]
    stats.images, tokens, stats.others = processes.from_rank(0, (stats.images, tokens, _on_host(stats.others)))
    for layer, count in zip(stats.layers.values(), tokens, strict=True):
        layer.tokens = count


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is pickled would come back on the card of whoever sent it."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _here(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _digest(batch: Any) -> int:
    found = 0
    for tensor in tensors_in(batch):
        found = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), found)
    return found
