"""Calibration that can be cut short: statistics in a file, saved on the way, used or gone on from by the next run."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.calibration.options import HIDDEN, VALUES, Calibration
from vitlr.calibration.shares import Share, together
from vitlr.calibration.statistics import Statistics
from vitlr.data.batches import count_images, for_model, image_shape
from vitlr.data.loader import Loader
from vitlr.data.preprocessing import input_size
from vitlr.errors import InputError, Interrupted, ProcessLost
from vitlr.runtime import processes
from vitlr.runtime.fields import names_of
from vitlr.runtime.progress import Progress

_logger = logging.getLogger("vitlr")
_SHARE = 0.05  # of the time that may go into saving on the way
_LEAST = 5.0  # seconds between two saves
_ROUNDS = 8  # of several processes, after which their sums are brought together
_DISK = 1e8  # bytes a second assumed before the first save


def resumed(
    calibrate: Callable[..., Statistics],
    model: nn.Module,
    loader: Iterable[Any] | None,
    file: str | os.PathLike[str],
    wanted: Calibration,
    asked: tuple[str, ...] = (),
    progress: Progress | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """The statistics in `file` where they are whole and fit; else the rest of them, or all, by `calibrate`.

    Of `wanted`, what is not the default or was `asked` for by name must be what the file holds; all else is as the file
    has it. Images are the same where the loader is one of `open_data` (by name and number) and taken to be otherwise.
    Raises `InputError` where the file is of another model, other layers, draws, objectives or images, and
    `Interrupted` where an interrupt stopped the run after what was measured had been saved.
    """
    path = Path(file)
    found = Statistics.load(path) if path.exists() else None
    if found is not None:
        try:
            _check_fits(model, found, loader, wanted, asked)
        except InputError as cause:
            raise InputError(f"{path}: {cause}; name another file, or remove this one") from cause
        if found.notes.get("complete", True):
            return found
    if loader is None:
        what = "" if found is None else f" ({path} was cut short and needs the rest)"
        raise InputError(f"loader= is missing{what}: give a folder of images, a .tar or hfds/NAME")
    return _measured(calibrate, loader, path, wanted, found, progress, on_batch)


def images_of(loader: Any) -> int | None:
    """How many images the loader will give, where it says so; what it calls so may be something else."""
    said = getattr(loader, "images", None)
    if isinstance(said, int):
        return said
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None


@visibility.seeing
def _check_fits(model: nn.Module, found: Statistics, loader: Any, wanted: Calibration, asked: tuple[str, ...]) -> None:
    modules, own = dict(model.named_modules()), isinstance(loader, Loader)
    found.check_fits({name: m.weight for name in found.layers if isinstance(m := modules.get(name), nn.Linear)})
    size, whose = found.input_shape, "the model takes"
    if own:
        size = tuple(loader.config["input_size"])
    elif isinstance(loader, (list, tuple)) and loader:  # with dynamic_img_size others than the model was made for
        size, whose = image_shape(for_model(model, loader[0])), "the loader gives"
    elif hasattr(model, "default_cfg") and not getattr(model, "dynamic_img_size", False):
        size = input_size(model)
    if found.input_shape != size:
        raise InputError(f"these statistics are of images {found.input_shape}, {whose} {size}")
    chosen = {key for key in names_of(Calibration) if getattr(wanted, key) != getattr(Calibration, key)} | set(asked)
    for key in ("samples", "seed"):
        value, has = getattr(wanted, key), getattr(found, key)
        if key in chosen and value != has:
            raise InputError(f"these statistics were collected with {key}={has}, not {value}")
    for objective in wanted.objectives if "objective" in chosen else ():
        if objective not in ("output", *found.objectives):
            held = ", ".join(found.objectives)
            raise InputError(f"these statistics were collected with objective={held}, not {objective}")
    if missing := [extra for extra in wanted.extras if extra not in found.extras]:
        raise InputError(f"these statistics hold no {missing[0]}")
    if wanted.hidden and HIDDEN not in found.extras:
        raise InputError(
            "these statistics hold no moments of hidden neurons, which a method other than 'lowrank' needs"
        )
    if wanted.hidden == "attention" and VALUES not in found.extras:
        raise InputError("these statistics hold no moments of value channels, which attention= asks for")
    layers = linears.targets(model, wanted.include, wanted.exclude)
    missing = [name for name in layers if name not in found.layers and name not in found.notes.get("unreached", ())]
    unfinished = not found.notes.get("complete", True) and len(layers) < len(found.layers)
    if missing or unfinished:
        extra = missing or [name for name in found.layers if name not in layers]
        raise InputError(f"these statistics are of other layers ({extra[0]}): include= or exclude= was different")
    if loader is not None:
        named, now = (found.notes.get("data"), found.notes.get("images_total")), (_name(loader), images_of(loader))
        if "data" in found.notes and None not in named and named != now:
            raise InputError(
                f"these statistics are of {named[1]} images of {named[0]}, "
                f"this run asks for {now[1]} images of {now[0]}"
            )
        _check_listing(found, loader)


def _check_listing(found: Statistics, loader: Any) -> None:
    """Raise `InputError` where a data set has the same name and number of images, and other files."""
    if not isinstance(loader, Loader) or found.notes.get("data") is None:
        return
    if "listing" not in found.notes:
        _logger.warning("statistics of an earlier vitlr know their images by name and number only, not by their files")
    elif found.notes["listing"] != loader.listing:
        raise InputError(f"these statistics are of another {found.notes['data']}: its files have other names or sizes")


def _name(loader: Any) -> str | None:
    return Path(os.path.normpath(loader.path)).name if isinstance(loader, Loader) else None


def _measured(
    calibrate: Callable[..., Statistics],
    loader: Iterable[Any],
    path: Path,
    wanted: Calibration,
    found: Statistics | None,
    progress: Progress | None,
    on_batch: Callable[[Statistics], None] | None,
) -> Statistics:
    """What the file does not hold, measured and saved."""
    total = images_of(loader)
    notes: dict[str, Any] = {"complete": False, "images_total": total, "files_done": 0, "skipped": 0}
    own = {"listing": loader.listing} if isinstance(loader, Loader) else {}
    notes |= {"data": _name(loader), **own, **(found.notes if found is not None else {})}
    done = notes["files_done"]
    if (
        type(done) is not int
        or type(notes["skipped"]) is not int
        or not 0 <= done <= (done if total is None else total)
    ):
        raise InputError(f"{path}: its notes are damaged (files_done={done!r} of {total}); remove the file")
    rest = _rest(loader, done)
    keeper = _Keeper(path, notes, found, rest)
    if found is not None and done == total:
        keeper.finish(found)
        return found
    if found is not None:  # what is measured is settled, only images are missing
        wanted = replace(
            wanted,
            objective=found.objectives,
            extras=found.extras,
            hidden=None,
            samples=found.samples,
            seed=found.seed,
            include=exactly(found.layers),
            exclude=None,
        )
    if progress is not None:
        progress(done, total)

    def after_batch(stats: Statistics) -> None:
        keeper.after_batch(stats)
        if on_batch is not None:
            on_batch(stats)

    def seen(images: int, _: int | None) -> None:
        if progress is not None:
            progress(images + keeper.notes["skipped"], total)

    with keeper.interrupts():
        try:
            stats = calibrate(keeper.batches(), options=wanted, stats=found, on_batch=after_batch, progress=seen)
        except InputError:
            # Whatever is left may be corrupt to the last file: what was measured before stands.
            if found is None or keeper.skipped < (images_of(rest) or 1):
                raise
            stats = found
        except KeyboardInterrupt as cause:
            raise keeper.interrupted() from cause
        except ProcessLost as cause:
            raise (cause.and_then(keeper.how_to_go_on) if path.exists() else cause) from cause
    stats.check_finite()
    keeper.finish(stats)
    return stats


def _rest(loader: Iterable[Any], done: int) -> Iterable[Any]:
    """The loader without the images that were seen; batches are as large as they were."""
    if not done:
        return loader
    if isinstance(loader, Loader):
        return loader.subset(range(done, loader.images))
    return _after(loader, done)


def _after(loader: Iterable[Any], done: int) -> Iterator[Any]:
    for batch in loader:
        if done <= 0:
            yield batch
            continue
        done -= count_images(batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch)
        if done < 0:
            raise InputError("what was measured ends within a batch of this loader; give the same batches again")


def exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and no others."""
    return [f"^{re.escape(name)}$" for name in names]


class _Keeper:
    """Knows how far calibration came; saves it now and then, and once more when an interrupt stops it.

    The sums are whole between batches only, so an interrupt waits for the batch in flight; the second one does not.
    """

    def __init__(self, path: Path, notes: dict[str, Any], found: Statistics | None, loader: Iterable[Any]) -> None:
        self.path, self.notes, self.stats, self.loader = path, notes, found, loader
        self._done, self._skipped = notes["files_done"], notes["skipped"]
        self._images = found.images if found is not None else 0
        self._busy = self._asked = False
        self._rounds = 0
        self._saved_at = time.monotonic()
        self._cost: float | None = None

    @property
    def skipped(self) -> int:
        """Files of this loader that could not be read."""
        return int(getattr(self.loader, "skipped", 0))

    def batches(self) -> Share:
        return Share(self.loader, self._begin)

    def _begin(self) -> None:
        self._busy = True

    def after_batch(self, stats: Statistics) -> None:
        self.stats = stats
        self._rounds += 1
        found = processes.gather((stats.images, self.skipped, self._asked))
        images, skipped, asked = (sum(numbers) for numbers in zip(*found, strict=True))
        self.notes["skipped"] = self._skipped + skipped
        self.notes["files_done"] = self._done + images - self._images + skipped
        if asked or processes.world() == 1 or self._rounds % _ROUNDS == 0:
            together(stats)
            self._busy = False
        if asked:
            raise KeyboardInterrupt
        if not self._busy and self._due(stats):
            self._save()

    def finish(self, stats: Statistics) -> None:
        if self.notes["images_total"] is not None:
            self.notes["files_done"] = self.notes["images_total"]
        self.notes.update(complete=True, skipped=self._skipped + self.skipped)
        self.stats = stats
        self._save()
        processes.gather(None)  # what comes next reads the file

    def interrupted(self) -> Interrupted:
        """Save what is whole and say what can be done with it."""
        if self.stats is None or self._busy:
            return Interrupted("nothing more was saved; run the same command again")
        self._save()
        done, total = self.notes["files_done"], self.notes["images_total"]
        of = "" if total is None else f" of {total}"
        return Interrupted(f"{done}{of} images are in {self.path}, run the same command again to go on")

    @property
    def how_to_go_on(self) -> str:
        """For whom another process is lost: sums are together in the file only."""
        return f"what was measured until the last save is in {self.path}, run the same command again to go on"

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM wait for the batch in flight (main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if processes.world() > 1:  # launchers send it more than once; all end together, after this round
            self._asked = True
            return
        if not self._busy or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\ninterrupted: saving after this batch; once more to stop at once\n")

    def _due(self, stats: Statistics) -> bool:
        if self._cost is None:
            size = sum(tensor.nbytes for layer in stats.layers.values() for _, tensor in layer.own())
            self._cost = size / _DISK
        return time.monotonic() - self._saved_at > max(_LEAST, self._cost / _SHARE)

    def _save(self) -> None:
        assert self.stats is not None
        start = time.monotonic()
        self.stats.check_finite()  # answers on other devices were not looked at
        self.stats.notes |= self.notes
        if processes.first():
            self.stats.save(self.path)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start
