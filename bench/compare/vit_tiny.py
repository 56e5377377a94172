"""The real ViT-Ti and its images, as every accuracy table here uses them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data import data_config, open_data

MODEL = "vit_tiny_patch16_224"
CHECKPOINT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


def calibration_tar(folder: Path) -> Path:
    return folder / "imagenet_calibration_1000.tar"


def validation_tar(folder: Path) -> Path:
    return folder / "imagenet_validation_1300.tar"


def calibration(folder: Path, model: nn.Module, cache: Path, batch_size: int = 50) -> Kept:
    """The 1000 calibration images with labels, as the model sees them in use, decoded once and kept in `cache`."""
    choices: dict[str, Any] = {"class_map": folder / "imagenet_synsets.txt", "batch_size": batch_size}
    return Kept.load(cache, lambda: open_data(calibration_tar(folder), model, **choices), model)


def validation(folder: Path, model: nn.Module, cache: Path, batch_size: int = 50, limit: int | None = None) -> Kept:
    """The 1300 validation images with labels, decoded once and kept in `cache`."""
    choices: dict[str, Any] = {"class_map": folder / "imagenet_synsets.txt", "need_labels": True}
    choices |= {"batch_size": batch_size, "limit": limit}
    return Kept.load(cache, lambda: open_data(validation_tar(folder), model, **choices), model)


class Kept:
    """Decoded batches in memory as bytes; a pass gives the loader's floats bit for bit (checked on decoding)."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor, skipped: int) -> None:
        self.batches, self.mean, self.std, self.skipped = batches, mean, std, skipped
        self.images = sum(len(labels) for _, labels in batches) + skipped

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self.batches:
            yield self._floats(pixels), labels

    def _floats(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    @classmethod
    def load(cls, path: Path, open_loader: Callable[[], Any], model: nn.Module) -> Kept:
        """Read the cache, or decode once and write it."""
        config = data_config(model)
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        if path.is_file():
            body = torch.load(path, weights_only=True)
            return cls(body["batches"], mean, std, body["skipped"])
        loader = open_loader()
        kept = cls([], mean, std, 0)
        for images, labels in loader:
            pixels = ((images * std + mean) * 255).round().to(torch.uint8)
            if not torch.equal(kept._floats(pixels), images):
                sys.exit(
                    "the transform of this model is more than bytes, scaled and shifted; its images cannot be kept so"
                )
            kept.batches.append((pixels, labels))
        kept.skipped = loader.skipped
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"batches": kept.batches, "skipped": kept.skipped}, path)
        return cls(kept.batches, mean, std, kept.skipped)


class Recorded(nn.Module):
    """Answers batch after batch with logits that were computed before: the dense model runs once, not once a row."""

    def __init__(self, model: nn.Module, loader: Kept) -> None:
        super().__init__()
        with torch.inference_mode():
            self.logits = [model(images) for images, _ in loader]
        self.next = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits[self.next % len(self.logits)]
        self.next += 1
        return logits


def weights_digest(model: nn.Module) -> str:
    """A name for the weights that the cached files belong to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
