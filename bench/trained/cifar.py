"""CIFAR-10 in memory, the small ViT that is trained on it, and its recipe: what the experiments on it share."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.common import BUILD, ROOT
from vitlr import create_model, evaluate
from vitlr.runtime.places import atomic_path
from vitlr.training import TrainRecipe

SHAPE = (3, 32, 32)
DEPTH, HEAD_DIM, PATCH = 6, 32, 8
BATCH_SIZE, EVALUATION_BATCH = 128, 500
# Ten epochs from nothing; then two more for everybody: the dense model, and every smaller one made of it.
FROM_NOTHING = TrainRecipe(epochs=10, lr=1e-3, warmup_epochs=0.5, keep="last")
AFTERWARDS = TrainRecipe(epochs=2, lr=5e-4, warmup_epochs=0.1, keep="last")


def vit(width: int = 128) -> nn.Module:
    """A plain timm ViT of 6 blocks with heads of 32 and patches of 8 x 8: 17 tokens an image."""
    args = {"img_size": 32, "patch_size": PATCH, "embed_dim": width, "depth": DEPTH, "num_heads": width // HEAD_DIM}
    return create_model("vit_tiny_patch16_224", **args, num_classes=10)


class Cifar:
    """Batches of one split: in the order of the files, or for training shuffled, flipped and shifted by up to 4 pixels.

    Draws come from torch's own generator, which training sets, so that an epoch repeats itself.
    """

    def __init__(self, archive: Path, split: str, *, training: bool = False, limit: int | None = None) -> None:
        arrays = _decoded(archive)
        self.images, self.labels = arrays[f"{split}.images"], arrays[f"{split}.labels"]
        if limit is not None:  # spread over the classes, which follow one another
            chosen = torch.arange(limit) * len(self.labels) // limit
            self.images, self.labels = self.images[chosen], self.labels[chosen]
        self.training = training
        self.batch_size = BATCH_SIZE if training else EVALUATION_BATCH

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + bool(rest and not self.training)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.training else torch.arange(len(self.labels))
        for chosen in order.split(self.batch_size)[: len(self)]:
            images = self.images[chosen]
            yield _normalized(_shifted(images) if self.training else images), self.labels[chosen]


def find_archive(given: Path | None) -> Path:
    """cifar10_jpeg.tar.xz in `given`, VITLR_DATA or ../shared/data."""
    import os

    folder = given or Path(os.environ.get("VITLR_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "cifar10_jpeg.tar.xz"
    return (
        path if path.is_file() else sys.exit(f"no {path.name} in {folder}: name the folder with VITLR_DATA or --data")
    )


def accuracy(model: nn.Module, archive: Path) -> dict[str, Any]:
    """Top-1 on the ten thousand test images with its interval, and the error."""
    found = evaluate(model, Cifar(archive, "test")).to_dict()
    kept = {key: round(found[key], 4) for key in ("top1", "top1_low", "top1_high")}
    return {**kept, "error": round(100 - found["top1"], 4)}


def _decoded(archive: Path) -> dict[str, Tensor]:
    """All images as bytes, decoded once and kept in bench/build."""
    kept = BUILD / "cifar10.safetensors"
    if not kept.is_file():
        from PIL import Image

        found: dict[str, Any] = {"train": [], "test": []}
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    split, label, name = member.name.split("/")[-3:]
                    file = tar.extractfile(member)
                    assert file is not None
                    pixels = Image.open(io.BytesIO(file.read())).convert("RGB").tobytes()
                    found[split].append((label, name, pixels))
        tensors = {}
        for split, images in found.items():
            images.sort()
            names = sorted({label for label, _, _ in images})
            joined = torch.frombuffer(bytearray(b"".join(pixels for _, _, pixels in images)), dtype=torch.uint8)
            tensors[f"{split}.images"] = joined.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
            tensors[f"{split}.labels"] = torch.tensor([names.index(label) for label, _, _ in images])
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            save_file(tensors, temporary)
    return load_file(kept)


def _normalized(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _shifted(images: Tensor) -> Tensor:
    """Every image flipped or not and shifted by up to 4 pixels, black beyond its edges."""
    n, shift, line = len(images), torch.randint(0, 9, (2, len(images), 1)), torch.arange(32)
    columns = torch.where(torch.rand(n, 1) < 0.5, 31 - line, line) + shift[0]
    rows = line + shift[1]
    padded = F.pad(images, (4, 4, 4, 4))
    at, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None]
    return padded[at, channel, rows[:, None, :, None], columns[:, None, None, :]]
