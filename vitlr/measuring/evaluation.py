"""How well a model classifies, and how far it is from the one it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError, NumericalError
from vitlr.measuring.losses import agreeing, first_tensor, kl
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import like
from vitlr.runtime.progress import Progress

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Metrics:
    """Accuracy over `images` images: top1, top5 and agreement in percent, kl in nats, top1_low..top1_high at 95 %.

    agreement (same first class as the reference) and kl = mean KL(reference || model) are None without a reference.
    """

    top1: float
    top5: float
    agreement: float | None
    kl: float | None
    images: int
    skipped: int
    top1_low: float
    top1_high: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"top-1 {self.top1:.2f} % [{self.top1_low:.2f}, {self.top1_high:.2f}], top-5 {self.top5:.2f} %"
        if self.agreement is not None:
            text += f", agreement {self.agreement:.2f} %, KL {self.kl:.4f} nats"
        return f"{text}, {self.images} images" + (f" ({self.skipped} skipped)" if self.skipped else "")


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    reference: nn.Module | None = None,
    *,
    progress: Progress | None = None,
) -> Metrics:
    """Classify every image of `loader` and compare with the labels, and with `reference` where one is given.

    The loader yields `(images [B, C, H, W], labels [B])`. Each model runs in eval mode on its own device and in its
    own dtype and gets its modes back; the numbers are formed in float64. With fewer than five classes, top-5 counts
    all of them. Raises `InputError` for a loader without images or labels, or with labels the model does not have,
    and `NumericalError` for logits that hold NaN or Inf.
    """
    total = getattr(loader, "images", None)
    images = top1 = top5 = agree = 0
    distance = 0.0
    with evaluation_mode(model), evaluation_mode(reference or model), torch.no_grad():
        for batch in loader:
            x, labels = _pair(batch)
            logits = _logits(model, x, "model")
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = best == _checked(labels, logits).unsqueeze(1)
            images += len(labels)
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            if reference is not None:
                expected = _logits(reference, x, "reference")
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
    low, high = wilson(top1, images)
    return Metrics(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        agreement=None if reference is None else 100 * agree / images,
        kl=None if reference is None else distance / images,
        images=images,
        skipped=getattr(loader, "skipped", 0),
        top1_low=100 * low,
        top1_high=100 * high,
    )


def wilson(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Interval of a proportion p = s/n: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927."""
    p, n = successes / trials, trials
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(t, Tensor) for t in batch[:2]):
        images, labels = batch[0], batch[1]
        if labels.ndim == 1 and len(labels) == len(images) and not labels.is_floating_point():
            return images, labels
        raise InputError(f"labels are {list(labels.shape)} {labels.dtype}, expected [{len(images)}] integers")
    raise InputError("the loader yields no labels; expected batches (images, labels)")


def _logits(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The model's answer as [B, classes] float64 on the CPU, whatever device and dtype it computes in."""
    p = like(model)
    logits = first_tensor(model(x.to(p.device, p.dtype, non_blocking=True)))
    if logits.ndim != 2:
        raise InputError(f"the {name} returned {list(logits.shape)}, expected logits [images, classes]")
    logits = logits.double().cpu()
    if not torch.isfinite(logits).all():
        raise NumericalError(f"the logits of the {name} hold NaN or Inf; check the weights, or use float32")
    return logits


def _checked(labels: Tensor, logits: Tensor) -> Tensor:
    labels = labels.cpu().long()
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels from {low} to {high}, the model has {logits.shape[1]} classes; give a class map (--class-map FILE)"
        )
    return labels
