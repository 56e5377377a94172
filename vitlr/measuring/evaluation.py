"""How well a model classifies, and how far it is from the one it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, first_tensor, labels_of, tensors, to_model
from vitlr.errors import InputError, NumericalError, VitlrError
from vitlr.measuring.losses import agreeing, kl
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.progress import Progress, shows
from vitlr.runtime.words import one_line

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Metrics:
    """Accuracy over `images` images: top1, top5 and agreement in percent, kl in nats, top1_low..top1_high at 95 %.

    agreement (same first class as the reference) and kl = mean KL(reference || model) are None without a reference,
    top1 and top5 without labels.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    images: int
    skipped: int
    top1_low: float | None
    top1_high: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return ", ".join(self.lines())

    def lines(self) -> list[str]:
        """What the labels say, what the reference says, and of how many images."""
        parts = []
        if self.top1 is not None:
            parts += [f"top-1 {self.top1:.2f} % [{self.top1_low:.2f}, {self.top1_high:.2f}], top-5 {self.top5:.2f} %"]
        if self.agreement is not None:
            parts += [f"agreement {self.agreement:.2f} %, KL {self.kl:.4f} nats"]
        return [*parts, f"{self.images} images" + (f" ({self.skipped} skipped)" if self.skipped else "")]


@shows("evaluating")
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    reference: nn.Module | None = None,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Classify every image of `loader` and compare with the labels, and with `reference` where one is given.

    The loader yields `(images [B, C, H, W], labels [B])` or dicts with `labels`; with a reference none are needed.
    `output_fn(answer)` picks the logits. Each model runs in eval mode on its own device and in its
    own dtype and gets its modes back; the numbers are formed in float64. With fewer than five classes, top-5 counts
    all of them. Raises `InputError` for a loader without images, without labels and reference, with labels the model
    does not have or images it cannot take, and `NumericalError` for logits that hold NaN or Inf.
    """
    if reference is not None and not isinstance(reference, nn.Module):
        raise InputError(f"reference= is a {type(reference).__name__}, expected a model")
    if isinstance(loader, (nn.Module, Tensor)) or not isinstance(loader, Iterable):
        raise InputError(f"the loader is a {type(loader).__name__}, expected batches (images, labels)")
    total, known = getattr(loader, "images", None), getattr(loader, "has_labels", True)
    if not known and reference is None:
        raise InputError("the labels of these images were not asked for: open_data(..., need_labels=True)")
    told: list[tuple[Tensor, Tensor]] = []  # labels and first classes
    images = labelled = top1 = top5 = agree = 0
    distance = 0.0
    with evaluation_mode(model), evaluation_mode(model if reference is None else reference), torch.no_grad():
        for batch in loader:
            labels = _labels(batch, needed=reference is None) if known else None
            logits = _logits(model, batch, "model", output_fn)
            images += len(logits)
            if labels is not None:
                labels, best = _checked(labels, logits), logits.topk(min(5, logits.shape[1]), dim=1).indices
                hits = best == labels.unsqueeze(1)
                told.append((labels, best[:, 0]))
                labelled += len(labels)
                top1 += int(hits[:, 0].sum())
                top5 += int(hits.sum())
            if reference is not None:
                expected = _logits(reference, batch, "reference", output_fn)
                if expected.shape != logits.shape:
                    raise InputError(
                        f"the reference has {expected.shape[1]} classes, the model {logits.shape[1]}; expected the same"
                    )
                agree += int(agreeing(expected, logits).sum())
                distance += float(kl(expected, logits).clamp_(min=0).sum())  # rounding may leave it below 0
            if progress is not None:
                progress(images + getattr(loader, "skipped", 0), total)
    if not images:
        raise InputError("the loader has no images; check the data")
    if labelled not in (0, images):
        raise InputError(f"the loader gives labels to {labelled} of {images} images; expected all or none")
    if labelled:
        _check_order(*(torch.cat(side) for side in zip(*told, strict=True)))
    low, high = wilson(top1, images)
    return Metrics(
        top1=100 * top1 / images if labelled else None,
        top5=100 * top5 / images if labelled else None,
        agreement=None if reference is None else 100 * agree / images,
        kl=None if reference is None else distance / images,
        images=images,
        skipped=getattr(loader, "skipped", 0),
        top1_low=100 * low if labelled else None,
        top1_high=100 * high if labelled else None,
    )


def _check_order(labels: Tensor, told: Tensor) -> None:
    """`InputError` where the model tells the classes apart, and gives them other numbers than the labels do.

    Two images of one class are then mostly told to be the same, two of any classes hardly ever, every class has an
    answer of its own, and that is mostly not its label: none of these holds of a model that guesses, and not all of
    one that takes several classes for one.
    """
    pairs = _pairs(torch.bincount(labels))
    same = _pairs(torch.unique(torch.stack([labels, told]), dim=1, return_counts=True)[1]) / max(pairs, 1)
    any_two = _pairs(torch.bincount(told)) / max(len(told) * (len(told) - 1) // 2, 1)
    right = float((labels == told).double().mean())
    if pairs < _PAIRS or same <= max(_ALIKE, 2 * any_two) or right >= same / 2:
        return
    answers = {int(label): int(told[labels == label].mode().values) for label in labels.unique()}
    if len(set(answers.values())) < _APART * len(answers):
        return
    label = next((label for label, answer in answers.items() if label != answer), 0)
    raise InputError(
        f"the classes are numbered otherwise than the model's: images of one class are told to be the same in "
        f"{same:.0%} of pairs, and are mostly called wrong (class {label} is called {answers[label]}); put the "
        "class map in the model's order"
    )


_PAIRS, _ALIKE, _APART = 10, 0.4, 0.75


def _pairs(counts: Tensor) -> int:
    """How many pairs there are within groups of these sizes."""
    return int((counts * (counts - 1) // 2).sum())


def wilson(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Interval of a proportion p = s/n: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927."""
    p, n = successes / trials, trials
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale))


def _labels(batch: Any, needed: bool) -> Tensor | None:
    """The labels of a batch; None where there are none and none are needed; −1 is what sets without them give."""
    labels = labels_of(batch)
    if labels is None or (len(labels.shape) == 1 and len(labels) and bool((labels == -1).all())):
        if needed:
            raise InputError(
                "the loader yields no labels; expected batches (images, labels), or give a reference: agreement and KL "
                "need none"
            )
        return None
    count = len(labels) if labels.ndim else 0
    if labels.ndim != 1 or labels.is_floating_point():
        raise InputError(f"labels are {list(labels.shape)} {labels.dtype}, expected [{count}] integers")
    return labels


def _logits(model: nn.Module, batch: Any, name: str, output_fn: Callable[[Any], Tensor] | None) -> Tensor:
    """The model's answer as [B, classes] float64 on the CPU, whatever device and dtype it computes in."""
    inputs = to_model(model, batch)
    try:
        answer = call(model, inputs)
    except _WRONG as cause:
        if isinstance(cause, VitlrError) or "out of memory" in str(cause):
            raise
        given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors(inputs))
        raise InputError(f"the {name} cannot take what the loader gives ({given}): {one_line(cause)}") from cause
    logits = first_tensor(answer if output_fn is None else output_fn(answer))
    if logits.ndim != 2:
        raise InputError(
            f"the {name} returned {list(logits.shape)}, expected logits [images, classes]; output_fn= picks them"
        )
    if logits.shape[1] < 2:
        raise InputError(
            f"the {name} returned one number an image, and accuracy needs two classes; for a binary logit give "
            "output_fn=lambda z: torch.cat([-z, z], 1) / 2"
        )
    labels = labels_of(batch)
    if labels is not None and labels.ndim and len(labels) != len(logits):
        raise InputError(f"labels are {list(labels.shape)} {labels.dtype}, expected [{len(logits)}] integers")
    logits = logits.double().cpu()
    if not torch.isfinite(logits).all():
        raise NumericalError(f"the logits of the {name} hold NaN or Inf; check the weights, or use float32")
    return logits


# What forwards raise on inputs that they cannot take.
_WRONG = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    labels = labels.cpu().long()
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels from {low} to {high}, the model has {logits.shape[1]} classes; give a class map (--class-map FILE)"
        )
    return labels
