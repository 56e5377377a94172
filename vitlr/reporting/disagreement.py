"""The images on which a model and the dense one disagree most, and what each takes them for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import first_tensor
from vitlr.data.preprocessing import data_config
from vitlr.measuring.losses import kl
from vitlr.reporting.judging import Recorded

SIDE = 160  # pixels of a thumbnail
TOP = 5


@dataclass(frozen=True)
class Disagreement:
    """One image [C, H, W] as the model saw it, KL(dense, small) in nats, and both answers as (class, share)."""

    image: Tensor
    distance: float
    dense: list[tuple[int, float]]
    small: list[tuple[int, float]]


class Spotting(nn.Module):
    """Answers as a model does, and keeps the `count` images whose answers are farthest from the recorded ones."""

    def __init__(self, model: nn.Module, recorded: Recorded, count: int) -> None:
        super().__init__()
        self.model, self.recorded, self.count, self.next = model, (recorded,), count, 0
        self.found: list[Disagreement] = []

    def forward(self, *args: Any, **named: Any) -> Any:
        answer = self.model(*args, **named)
        expected, found = self.recorded[0].answers[self.next].double(), first_tensor(answer).detach().double().cpu()
        self.next += 1
        if self.count and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            self._keep(args[0], expected, found)
        return answer

    def _keep(self, images: Tensor, expected: Tensor, found: Tensor) -> None:
        distances = kl(expected, found)
        for index in distances.argsort(descending=True)[: self.count].tolist():
            image, distance = images[index].detach().float().cpu().clone(), float(distances[index])
            self.found.append(Disagreement(image, distance, top(expected[index]), top(found[index])))
        self.found = sorted(self.found, key=lambda one: -one.distance)[: self.count]


def top(logits: Tensor) -> list[tuple[int, float]]:
    """The likeliest classes and their shares."""
    shares, classes = logits.softmax(0).topk(min(TOP, len(logits)))
    return list(zip(classes.tolist(), shares.tolist(), strict=True))


def thumbnail(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """A JPEG as a data URI, of an image as the model sees it."""
    from PIL import Image

    shift, scale = (torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    pixels = ((image * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def class_names(model: nn.Module, classes: int) -> list[str] | None:
    """ImageNet's words, where timm describes the model as one of its thousand classes; None otherwise."""
    cfg = getattr(model, "pretrained_cfg", None)
    if classes != 1000 or not isinstance(cfg, dict) or cfg.get("num_classes") != 1000:
        return None
    from timm.data import ImageNetInfo

    words = ImageNetInfo()
    return [str(words.index_to_description(index)).partition(",")[0] for index in range(classes)]


def normalisation(images: Any, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the images that a loader gives."""
    config = getattr(images, "config", None) or data_config(model)
    return config["mean"], config["std"]
