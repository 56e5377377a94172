"""How long models take for an image, in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vitlr.data.batches import call
from vitlr.engines.names import OTHERS
from vitlr.engines.runners import runners
from vitlr.errors import VitlrError
from vitlr.measuring import timing
from vitlr.measuring.clock import race
from vitlr.runtime.modules import device_of, like
from vitlr.runtime.progress import Progress
from vitlr.runtime.words import one_line

BATCHES = (1, 8)  # images at once whose time is measured


@dataclass
class Speeds:
    """Milliseconds an image, `ms[batch][engine][model]`, and why a model has none in an engine."""

    ms: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def least(self, model: str, engines: Sequence[str]) -> float | None:
        """Of one image, in the fastest of these engines; None where it ran in none."""
        found = [self.ms[BATCHES[0]].get(name, {}).get(model) for name in engines]
        return min((ms for ms in found if ms is not None), default=None)


def milliseconds(models: Mapping[str, nn.Module], size: Sequence[int], batch: int = 1) -> dict[str, float]:
    """Milliseconds an image [C, H, W] in batches of `batch`; on a CPU those of torch's threads as they are set."""
    first = next(iter(models.values()))
    if device_of(first).type != "cpu":
        found = timing.throughput(models, batch, input_size=size)
        return {name: times["batch_ms"] / batch for name, times in found.items()}
    x = _noise(first, size, batch)
    found_ms = race({name: (model, x) for name, model in models.items()}, torch.get_num_threads())
    return {name: ms / batch for name, ms in found_ms.items()}


def by_engine(
    models: Mapping[str, nn.Module], engines: Sequence[str], size: Sequence[int], progress: Progress | None = None
) -> Speeds:
    """All models in all engines, in turns; what an engine cannot run is left out, with the reason."""
    others = tuple(name for name in engines if name in OTHERS)
    groups = [(name,) for name in engines if name not in OTHERS] + [others] * bool(others)
    speeds = Speeds()
    steps, done = len(models) * len(groups) + len(BATCHES), 0
    with tempfile.TemporaryDirectory(prefix="vitlr-report-") as folder:
        ready: dict[str, nn.Module] = {}
        for which, model in models.items():
            x = _noise(model, size, BATCHES[0])
            for group in groups:
                place = Path(folder) / f"{which}-{group[0]}"
                place.mkdir()
                try:
                    found = runners(model, group, place)
                    for runner in found.values():  # compilers fail here
                        with torch.inference_mode():
                            call(runner, x)
                except Exception as cause:
                    if not isinstance(cause, VitlrError) and group != ("compile",):
                        raise
                    speeds.refused[f"{which} in {', '.join(group)}"] = one_line(cause, 300)
                else:
                    ready |= {f"{which} {name}": runner for name, runner in found.items()}
                done += 1
                _tell(progress, done, steps)
        for batch in BATCHES:
            times = milliseconds(ready, size, batch)
            here: dict[str, dict[str, float]] = {}
            for key, ms in times.items():
                which, name = key.split()
                here.setdefault(name, {})[which] = ms
            speeds.ms[batch] = {name: here[name] for name in engines if name in here}
            done += 1
            _tell(progress, done, steps)
    return speeds


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _noise(model: nn.Module, size: Sequence[int], batch: int) -> Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(like(model).dtype)
