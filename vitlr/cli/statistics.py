"""Statistics for `vitlr compress`: read from `--stats` where they fit, measured otherwise, saved on the way."""

from __future__ import annotations

import inspect
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import DEFAULT, HIDDEN, VALUES
from vitlr.calibration.statistics import Statistics
from vitlr.data.loader import Loader, data_config, open_data
from vitlr.errors import InputError, Interrupted
from vitlr.runtime.progress import bar

_SHARE = 0.05  # of the time that may go into saving on the way
_LEAST = 5.0  # seconds between two saves
_DISK = 1e8  # bytes a second assumed before the first save


@dataclass(frozen=True)
class Request:
    """What the command line asks to be measured; None leaves the choice to the statistics at hand."""

    data: str | None
    class_map: Path | None
    limit: int | None
    batch_size: int
    workers: int | None
    objective: str | None
    samples: int | None
    seed: int | None
    layers: tuple[str, ...]
    path: Path | None
    hidden: bool | str = False  # as of `calibrate`

    def open(self, model: nn.Module, skip: int = 0, limit: int | None = None) -> Loader:
        """The images from the `skip`-th on."""
        assert self.data is not None
        return open_data(
            self.data,
            model,
            class_map=self.class_map,
            batch_size=self.batch_size,
            workers=self.workers,
            skip=skip,
            limit=self.limit if limit is None else limit,
        )


def statistics_for(model: nn.Module, request: Request) -> Statistics:
    """The statistics that `request` asks for: those of an earlier run, the rest of a run cut short, or all of them.

    Raises `InputError` where the file at `request.path` is of another model, objective or data set, and
    `Interrupted` where an interrupt stopped the run after what was measured had been saved.
    """
    found = Statistics.load(request.path) if request.path is not None and request.path.exists() else None
    if found is not None:
        try:
            _check_fits(found, model, request)
        except InputError as cause:
            raise InputError(f"{request.path}: {cause}; name another --stats file or remove this one") from cause
    complete = found is not None and found.notes.get("complete", True)
    if request.data is None:
        if not complete:
            what = "" if found is None else f" ({request.path} was cut short and needs the rest)"
            raise InputError(f"--data is missing{what}: give a folder of images, a .tar or hfds/NAME")
        assert found is not None
        return found
    loader = request.open(model)
    if found is not None:
        _check_data(found, request, loader)
    if complete:
        assert found is not None
        return found
    return _measure(model, request, found, loader)


def _check_fits(found: Statistics, model: nn.Module, request: Request) -> None:
    modules = dict(model.named_modules())
    found.check_fits({name: m.weight for name in found.layers if isinstance(m := modules.get(name), nn.Linear)})
    size = tuple(data_config(model)["input_size"])
    if found.input_shape != size:
        raise InputError(f"these statistics are of images {found.input_shape}, the model takes {size}")
    for key in ("samples", "seed"):
        asked, has = getattr(request, key), getattr(found, key)
        if asked not in (None, has):
            raise InputError(f"these statistics were collected with --{key} {has}, not {asked}")
    if request.objective not in (None, "output", *found.objectives):
        held = ", ".join(found.objectives)
        raise InputError(f"these statistics were collected with --objective {held}, not {request.objective}")
    if request.hidden and HIDDEN not in found.extras:
        raise InputError("these statistics hold no moments of hidden neurons, which --method asks for")
    if request.hidden == "attention" and VALUES not in found.extras:
        raise InputError("these statistics hold no moments of value channels, which --prune-attention asks for")
    missing = [name for name in request.layers if name not in found.layers]
    unfinished = not found.notes.get("complete", True) and len(request.layers) < len(found.layers)
    if missing or unfinished:
        extra = missing or [name for name in found.layers if name not in request.layers]
        raise InputError(f"these statistics are of other layers ({extra[0]}): --include or --exclude was different")


def _check_data(found: Statistics, request: Request, loader: Loader) -> None:
    notes, asked = found.notes, (_data_name(request), loader.images)
    known = (notes.get("data"), notes.get("images_total"))
    if "data" in notes and known != asked:
        raise InputError(
            f"{request.path}: these statistics are of {known[1]} images of {known[0]}, this run asks for {asked[1]} "
            f"images of {asked[0]}; name another --stats file, or remove this one"
        )


def _data_name(request: Request) -> str:
    return Path(os.path.normpath(request.data or "")).name


def _measure(model: nn.Module, request: Request, found: Statistics | None, loader: Loader) -> Statistics:
    total = loader.images
    notes = {"complete": False, "images_total": total, "files_done": 0, "skipped": 0, "data": _data_name(request)}
    if found is not None:
        notes = {**notes, **found.notes}
    done = notes["files_done"]
    if type(done) is not int or type(notes["skipped"]) is not int or not 0 <= done <= total:
        raise InputError(f"{request.path}: its notes are damaged (files_done={done!r} of {total}); remove the file")
    keeper = _Keeper(request.path, notes, found)
    if done < total:
        if done:
            loader = request.open(model, skip=done, limit=total - done)
        keeper.loader = loader
        label = "calibrating" if not done else f"calibrating from image {done}"
        how: dict[str, Any] = {"objective": request.objective or DEFAULT}
        how |= {key: getattr(request, key) for key in ("samples", "seed") if getattr(request, key) is not None}
        if request.hidden:
            how["hidden"] = request.hidden
        if found is not None:  # what is measured is settled, only images are missing
            how = {"objective": found.objectives} | {key: getattr(found, key) for key in _remembered()}
        with bar(label, total) as progress, keeper.interrupts():
            try:
                stats = calibrate(
                    model,
                    keeper.batches(loader),
                    **how,
                    include=exactly(request.layers),
                    stats=found,
                    on_batch=keeper.after_batch,
                    progress=lambda images, _: progress(images + keeper.notes["skipped"], total),
                )
            except InputError:
                # Whatever is left may be corrupt to the last file: what was measured before stands.
                if found is None or loader.skipped < loader.images:
                    raise
                stats = found
            except KeyboardInterrupt as cause:
                raise keeper.interrupted() from cause
    else:
        assert found is not None
        stats = found
    stats.check_finite()
    keeper.finish(stats)
    return stats


def _remembered() -> set[str]:
    """The options of `calibrate` that the statistics keep: extras, samples, seed and whatever comes to them."""
    return {field.name for field in fields(Statistics)} & set(inspect.signature(calibrate).parameters)


def exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and no others."""
    return [f"^{re.escape(name)}$" for name in names]


class _Keeper:
    """Knows how far calibration came; saves it now and then, and once more when an interrupt stops it.

    The sums are whole between batches only, so an interrupt waits for the batch in flight; the second one does not.
    """

    def __init__(self, path: Path | None, notes: dict[str, Any], found: Statistics | None) -> None:
        self.path, self.notes, self.stats = path, notes, found
        self.loader: Loader | None = None
        self._done, self._skipped = notes["files_done"], notes["skipped"]
        self._images = found.images if found is not None else 0
        self._busy = self._asked = False
        self._saved_at = time.monotonic()
        self._cost: float | None = None

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            self._busy = True
            yield batch

    def after_batch(self, stats: Statistics) -> None:
        assert self.loader is not None
        self.stats = stats
        self.notes["skipped"] = self._skipped + self.loader.skipped
        self.notes["files_done"] = self._done + stats.images - self._images + self.loader.skipped
        self._busy = False
        if self._asked:
            raise KeyboardInterrupt
        if self.path is not None and self._due(stats):
            self._save()

    def finish(self, stats: Statistics) -> None:
        self.notes.update(complete=True, files_done=self.notes["images_total"])
        if self.loader is not None:
            self.notes["skipped"] = self._skipped + self.loader.skipped
        self.stats = stats
        stats.notes = dict(self.notes)
        if self.path is not None:
            self._save()

    def interrupted(self) -> Interrupted:
        """Save what is whole and say what can be done with it."""
        if self.path is None:
            return Interrupted("with --stats F the next run would go on where this one stopped")
        if self.stats is None or self._busy:
            return Interrupted("nothing more was saved; run the same command again")
        self._save()
        done, total = self.notes["files_done"], self.notes["images_total"]
        return Interrupted(f"{done} of {total} images are in {self.path}, run the same command again to go on")

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM wait for the batch in flight, where there is a file to save to (main thread only)."""
        if self.path is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if not self._busy or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\ninterrupted: saving after this batch; once more to stop at once\n")

    def _due(self, stats: Statistics) -> bool:
        if self._cost is None:
            size = sum(tensor.nbytes for layer in stats.layers.values() for _, tensor in layer.sums())
            self._cost = size / _DISK
        return time.monotonic() - self._saved_at > max(_LEAST, self._cost / _SHARE)

    def _save(self) -> None:
        assert self.path is not None and self.stats is not None
        start = time.monotonic()
        self.stats.notes = dict(self.notes)
        self.stats.save(self.path)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - start
