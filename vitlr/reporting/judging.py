"""How good a model is beside the dense one: accuracy where there are labels, agreement and KL, cosine of features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, first_tensor, to_model
from vitlr.data.loader import Loader
from vitlr.data.preprocessing import input_size
from vitlr.errors import InputError
from vitlr.measuring.cost import example_input
from vitlr.measuring.evaluation import evaluate
from vitlr.measuring.losses import directions, is_logits
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.progress import Progress

KEYS = ("top1", "agreement", "cosine")  # what a model is judged by: the first of these that there is


@dataclass(frozen=True)
class Judged:
    """top1, its 95 % interval and agreement in percent, kl in nats, mean cosine to the dense features; or None."""

    images: int
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None

    @property
    def key(self) -> str:
        """What it is judged by."""
        return next(key for key in KEYS if getattr(self, key) is not None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Recorded(nn.Module):
    """Answers as a model does, and keeps the answers, so that the dense model looks at every image once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.answers: list[Tensor] = []

    def forward(self, *args: Any, **named: Any) -> Tensor:
        answer = first_tensor(self.model(*args, **named))
        self.answers.append(answer.float().cpu())
        return answer


class Played(nn.Module):
    """Answers batch after batch with what was recorded, or with what has just been."""

    def __init__(self, recorded: Recorded, last: bool = False) -> None:
        super().__init__()
        self.recorded, self.last, self.next = (recorded,), last, 0  # in a tuple: its parameters are not ours

    def forward(self, *args: Any, **named: Any) -> Tensor:
        answers, self.next = self.recorded[0].answers, self.next + 1
        return answers[-1 if self.last else self.next - 1]


@dataclass
class Judge:
    """Judges models on the same images against the same dense model; `InputError` where its answer is no vector."""

    dense: nn.Module
    images: Iterable[Any]
    recorded: Recorded | None = field(default=None, repr=False)
    logits: bool | None = None

    @property
    def replays(self) -> bool:
        """Whether the images are the same at every pass, so that the dense model need not see them twice."""
        return isinstance(self.images, (Loader, list, tuple))

    def of_dense(self, progress: Progress | None = None) -> Judged:
        """The dense model itself."""
        self.recorded = Recorded(self.dense)
        return self._judged(self.recorded, Played(self.recorded, last=True), progress)

    def of(self, model: nn.Module, progress: Progress | None = None) -> Judged:
        """A model made of it."""
        reference = self.dense
        if self.replays:
            if self.recorded is None:
                self.of_dense()
            assert self.recorded is not None
            reference = Played(self.recorded)
        return self._judged(model, reference, progress)

    def _judged(self, model: nn.Module, reference: nn.Module, progress: Progress | None) -> Judged:
        if self.logits is None:
            self.logits = self._logits()
        if not self.logits:
            return cosines(model, reference, self.images, progress)
        found = evaluate(model, self.images, reference, progress=progress)
        return Judged(found.images, found.top1, found.top1_low, found.top1_high, found.agreement, found.kl)

    def _logits(self) -> bool:
        with evaluation_mode(self.dense), torch.inference_mode():
            for batch in self.images:
                return is_logits(self.dense, call(self.dense, to_model(self.dense, batch)))
        raise InputError("the loader has no images; check the data")


def cosines(model: nn.Module, reference: nn.Module, images: Iterable[Any], progress: Progress | None = None) -> Judged:
    """The mean over images of the cosine of a model's features to the reference's."""
    found: list[Tensor] = []
    total, done = getattr(images, "images", None), 0
    with evaluation_mode(model), evaluation_mode(reference), torch.inference_mode():
        for batch in images:
            a, b = (first_tensor(call(m, to_model(m, batch))).double().cpu() for m in (model, reference))
            found.append((directions(a) * directions(b)).sum(1))
            done += len(a)
            if progress is not None:
                progress(done + getattr(images, "skipped", 0), total)
    if not found:
        raise InputError("the loader has no images; check the data")
    return Judged(done, cosine=float(torch.cat(found).mean()))


def classifies(model: nn.Module) -> bool:
    """Whether a model that says how large its images are answers with logits, rather than features."""
    with evaluation_mode(model), torch.inference_mode():
        return is_logits(model, call(model, example_input(model, input_size(model))))
