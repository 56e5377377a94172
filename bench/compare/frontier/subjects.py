"""What is made small and how it is judged: a classifier by its labels, a model of features by what becomes of them."""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.compare.vit_tiny import CHECKPOINT, MODEL, Kept, calibration, calibration_tar, validation, validation_tar
from vitlr.checkpoint.creation import create_model
from vitlr.data import data_config, open_data
from vitlr.measuring.evaluation import wilson
from vitlr.measuring.losses import agreeing, kl

Forward = Callable[[Tensor], Tensor]
DINOV2 = "vit_small_patch14_dinov2"
NEIGHBOURS = 10
SIZE = 112  # pixels of DINOv2's images: a multiple of 14 at which a row takes minutes


class Subject:
    """A dense model, its calibration images, and the figures by which what was made of it is judged."""

    name: str
    title: str
    key: str
    """The figure that a frontier is drawn of; `KEY_low` and `KEY_high` are its interval."""
    floor: float
    """Of that figure: what lies below is no use to anyone, and not drawn."""
    figures: ClassVar[dict[str, tuple[str, str]]]
    """What a table shows of it: the column's heading and its format."""

    def __init__(self, model: nn.Module, images: Kept) -> None:
        self.model, self.images = model, images
        self.spectra: dict[str, Any] = {}  # by method: the next size needs no solving

    def measured(self, forward: Forward) -> dict[str, Any]:
        """All figures of a model that answers as `forward` does."""
        raise NotImplementedError


class Classifier(Subject):
    """ViT-Ti on the validation images: top-1, and how far the answers are from the dense model's."""

    name, title, key = "vit_tiny", "ViT-Ti/16, ImageNet classes", "top1"
    floor = 40.0
    figures: ClassVar = {"top1": ("top-1", ".2f"), "agreement": ("agreement", ".2f"), "kl": ("KL", ".4f")}

    def __init__(self, folder: Path, cache: Path, args: argparse.Namespace) -> None:
        model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
        super().__init__(model, calibration(folder, model, cache / "calibration.pt"))
        self.validation = validation(folder, model, cache / f"validation-{args.limit or 'all'}.pt", limit=args.limit)
        self.expected = kept(cache / f"dense-{args.limit or 'all'}.pt", lambda: answers(model, self.validation))
        self.labels = torch.cat([labels for _, labels in self.validation])
        self.says = {
            "checkpoint": CHECKPOINT,
            "judged_on": f"the {len(self.labels)}-image subset of the ILSVRC2012 validation set (easier than the full "
            "set: do not read it as ImageNet accuracy)",
        }

    def measured(self, forward: Forward) -> dict[str, Any]:
        found = answers(forward, self.validation)
        hits = int((found.argmax(1) == self.labels).sum())
        return {
            **proportion("top1", hits, len(found)),
            "agreement": 100 * agreeing(self.expected, found).double().mean().item(),
            "kl": kl(self.expected.double(), found.double()).clamp(min=0).mean().item(),
        }


class Features(Subject):
    """DINOv2 ViT-S/14 without a head: cosine of its features to the dense ones, and nearest neighbours by them."""

    name, title, key = "dinov2", "DINOv2 ViT-S/14, features", "cosine"
    floor = 0.8
    figures: ClassVar = {"cosine": ("cosine", ".4f"), "knn": ("kNN", ".1f")}

    def __init__(self, folder: Path, cache: Path, args: argparse.Namespace) -> None:
        if args.dinov2 is None:
            raise SystemExit("--model dinov2 needs --dinov2 FILE, the weights that dinov2_small.py of the data writes")
        path = cache / "weights.safetensors"
        if not path.is_file():  # positions resampled once, so that no file holds those of other sizes
            large = create_model(DINOV2, num_classes=0, checkpoint=args.dinov2)
            large.set_input_size(img_size=SIZE)  # type: ignore[operator]
            save_file(large.state_dict(), path)
        model = create_model(DINOV2, num_classes=0, img_size=SIZE, checkpoint=path)
        super().__init__(model, pictures(calibration_tar(folder), model, cache / "calibration.pt"))
        cosine = args.limit or 200
        path = validation_tar(folder)
        self.validation = pictures(path, model, cache / f"validation-{cosine}.pt", limit=cosine)
        self.bank = cifar(folder, model, "train", args.bank // 10, cache / f"bank-{args.bank}.pt")
        self.asked = cifar(folder, model, "test", args.asked // 10, cache / f"asked-{args.asked}.pt")
        self.expected = kept(cache / f"dense-{cosine}.pt", lambda: answers(model, self.validation))
        self.says = {
            "checkpoint": "dinov2_small.py",
            "judged_on": f"cosine to the dense features on {len(self.expected)} images of the ILSVRC2012 validation "
            f"set, and the class of CIFAR-10 by {NEIGHBOURS} nearest neighbours: {self.asked.images} test images among "
            f"{self.bank.images} training images, both seen by the small model; all at {SIZE} pixels",
        }

    def measured(self, forward: Forward) -> dict[str, Any]:
        found = F.cosine_similarity(answers(forward, self.validation).double(), self.expected.double())
        half = 1.96 * found.std().item() / len(found) ** 0.5
        mean = found.mean().item()
        bank, asked = (F.normalize(answers(forward, images)) for images in (self.bank, self.asked))
        (of_bank, truth) = (torch.cat([labels for _, labels in images]) for images in (self.bank, self.asked))
        hits = int((neighbours(bank, of_bank, asked) == truth).sum())
        interval = {"cosine_low": mean - half, "cosine_high": min(1.0, mean + half)}
        return {"cosine": mean, **interval, **proportion("knn", hits, len(truth))}


SUBJECTS = {subject.name: subject for subject in (Classifier, Features)}


def neighbours(bank: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The class `[n]` of the nearest in the bank, each counted by its cosine; features are of length one."""
    near = (asked @ bank.T).topk(NEIGHBOURS)
    votes = torch.zeros(len(asked), int(labels.max()) + 1).scatter_add_(1, labels[near.indices], near.values)
    return votes.argmax(1)


@torch.inference_mode()
def answers(forward: Forward, images: Kept) -> Tensor:
    """What a model says to all images, in float32."""
    return torch.cat([forward(batch).float() for batch, _ in images])


def proportion(key: str, hits: int, total: int) -> dict[str, float]:
    """A share in percent and its 95 % interval."""
    low, high = wilson(hits, total)
    return {key: 100 * hits / total, f"{key}_low": 100 * low, f"{key}_high": 100 * high}


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor of an earlier run, or made and kept."""
    if not path.is_file():
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def pictures(tar: Path, model: nn.Module, path: Path, **choices: Any) -> Kept:
    """Images without labels, as the model takes them."""
    return Kept.load(path, lambda: open_data(tar, model, batch_size=50, **choices), model)


def cifar(folder: Path, model: nn.Module, part: str, each: int, path: Path) -> Kept:
    """The first so many images of every class of CIFAR-10, as large as the model takes them."""
    return Kept.load(path, lambda: _Cifar(folder / "cifar10_jpeg.tar.xz", model, part, each), model)


class _Cifar:
    skipped = 0

    def __init__(self, path: Path, model: nn.Module, part: str, each: int) -> None:
        self.path, self.config, self.part, self.each = path, data_config(model), part, each

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from PIL import Image
        from timm.data.transforms import MaybeToTensor
        from torchvision.transforms import Normalize

        size = self.config["input_size"][-2:]
        to_tensor, normalize = MaybeToTensor(), Normalize(self.config["mean"], self.config["std"])
        of: dict[str, list[tuple[str, bytes]]] = {}
        with tarfile.open(self.path) as tar:
            for member in tar:
                part, *rest = member.name.removeprefix("./").split("/")
                if part == self.part and len(rest) == 2 and (file := tar.extractfile(member)) is not None:
                    of.setdefault(rest[0], []).append((rest[1], file.read()))
        for label, name in enumerate(sorted(of)):
            images = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in sorted(of[name])[: self.each]]
            large = [to_tensor(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
            yield normalize(torch.stack(large)), torch.full((len(large),), label)
