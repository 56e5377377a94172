"""ViT-B as a subject of which time alone is asked: random weights, noise for images, no accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.compare.frontier.subjects import SUBJECTS, Forward, Subject
from vitlr.checkpoint.creation import create_model

MODEL = "vit_base_patch16_224"


class Noise:
    """Batches of eight images of noise, always the same."""

    skipped = 0

    def __init__(self, batches: int) -> None:
        self.batches, self.images = batches, 8 * batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            yield torch.randn(8, 3, 224, 224, generator=generator), torch.zeros(8, dtype=torch.long)


class Base(Subject):
    """ViT-B/16, for which no weights are at hand."""

    name, title, key = "vit_base", "ViT-B/16, random weights", ""
    floor = 0.0
    figures: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init__(self, folder: Path, cache: Path, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        super().__init__(create_model(MODEL), Noise(2))  # type: ignore[arg-type]
        self.says = {
            "checkpoint": "random",
            "judged_on": "nothing, as its weights are random",
        }

    def measured(self, forward: Forward) -> dict[str, Any]:
        return {}


ALL = {**SUBJECTS, Base.name: Base}
