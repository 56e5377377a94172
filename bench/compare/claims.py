"""The claims of arXiv 2402.06004 on what can be had: a DINOv2 ViT-S fine-tuned on CIFAR-10, squeezed and fine-tuned.

    python -m bench.compare.claims --dinov2 DINOV2.safetensors --cifar FOLDER [--epochs 1] [--json FILE]

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg. Every model is trained on all training images for the same
epochs by one recipe, at a lower rate where it has no new head; the squeezed ones start from the dense fine-tuned one
and learn its answers beside the labels.
A ViT-Ti, pretrained on ImageNet-21k, is fine-tuned the same way on as many patches, and the ViT-S squeezed to its
size. The test images are looked at once a row, for the table. Models are kept in --work, so that a run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, data_folder, finish, parser, write_json
from bench.compare.vit_tiny import CHECKPOINT
from bench.compare.vit_tiny import MODEL as TINY
from vitlr import calibrate, compress, create_model, evaluate, fuse, load, save
from vitlr.data import open_data
from vitlr.measuring.cost import count_params
from vitlr.runtime.progress import bar
from vitlr.training import TrainRecipe, train

LARGE = "vit_small_patch14_dinov2"
SIZES = {LARGE: 70, TINY: 80}  # 5 x 5 patches each
KEPT = 40  # percent of the parameters
AGAIN = 0.01 / 384  # peak rate where all weights are trained ones, as of the rung distil; 1e-4 with a new head


class Claims:
    """One run: models by name, made or read from the folder of work, and the rows of the table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.kept = args, args.work / "rows.json"
        args.work.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = json.loads(self.kept.read_text())["rows"] if self.kept.is_file() else []

    def trained(
        self, name: str, make: Callable[[], nn.Module], reference: nn.Module | None = None, lr: float = 1e-4
    ) -> nn.Module:
        """`make()` fine-tuned on the labels; read from the folder of work where it is there."""
        path = self.args.work / f"{name}.safetensors"
        start = time.process_time()
        if not path.is_file():
            model = make()
            images = open_data(self.args.cifar / "train", model, batch_size=64, limit=self.args.limit)
            how: dict[str, Any] = {"epochs": self.args.epochs, "seed": self.args.seed, "keep": "last"}
            recipe = TrainRecipe(lr=lr, warmup_epochs=0.1, scale=(0.35, 1.0), **how)
            with bar(f"fine-tuning {name}", unit="updates") as progress:
                train(model, images, recipe, reference=reference, resume=self.args.work / name, progress=progress)
            save(model.eval(), path)
        model = load(path)
        self.row(name, model, time.process_time() - start)
        return model

    def row(self, name: str, model: nn.Module, seconds: float) -> None:
        """Look at the test images, once for all runs."""
        if any(row["name"] == name for row in self.rows):
            return
        images = open_data(self.args.cifar / "test", model, batch_size=100, limit=self.args.judge, need_labels=True)
        found = evaluate(model, images)
        count = count_params(model)
        self.rows.append({"name": name, "params": count, "seconds": round(seconds, 1), **found.to_dict()})
        write_json(self.kept, {"rows": self.rows})
        print(f"{name}: {count / 1e6:.2f} M parameters, {found}, {seconds:.0f} s", flush=True)

    def squeezed(self, name: str, dense: nn.Module, budget: str) -> nn.Module:
        """`dense` under the budget by 1000 unlabelled training images, judged as it is, then fine-tuned."""

        def made() -> nn.Module:
            start = time.process_time()
            images = open_data(self.args.cifar / "train", dense, batch_size=50, limit=1000)
            small = compress(dense, images, budget, method="joint")
            self.row(f"{name}, no training", small, time.process_time() - start)
            return small

        return self.trained(name, made, dense, AGAIN)

    def in_bytes(self, name: str, model: nn.Module) -> None:
        """The same model multiplying bytes, by the ranges of 1000 training images."""
        start = time.process_time()
        images = open_data(self.args.cifar / "train", model, batch_size=50, limit=1000)
        seen = calibrate(model, images, objective="output", hidden=False, extras=("ranges",))
        self.row(name, fuse(model, bits=8, stats=seen), time.process_time() - start)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    claims = Claims(args)

    def pretrained(name: str, file: Path) -> nn.Module:
        torch.manual_seed(args.seed)  # of the new head
        return create_model(name, checkpoint=file, new_head=True, num_classes=10, img_size=SIZES[name])

    dense = claims.trained("ViT-S", lambda: pretrained(LARGE, args.dinov2))
    small = claims.squeezed(f"ViT-S, params:{KEPT}%", dense, f"params:{KEPT}%")
    claims.in_bytes(f"ViT-S, params:{KEPT}%, int8", small)
    tiny = claims.trained("ViT-Ti", lambda: pretrained(TINY, data_folder(args.data) / CHECKPOINT))
    claims.squeezed("ViT-S at the size of ViT-Ti", dense, f"params:{count_params(tiny)}")
    claims.trained("ViT-S, trained again", lambda: dense, None, AGAIN)  # as long as its squeezed twins were in all
    finish("claims", {"epochs": args.epochs, "train": args.limit or 50000, "rows": claims.rows}, args.json)


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--dinov2", type=Path, required=True, help="weights of a DINOv2 ViT-S/14 without a head")
    args.add_argument("--cifar", type=Path, required=True, help="folder of CIFAR-10: train/<class>, test/<class>")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--work", type=Path, default=BUILD / "claims", help="where models and snapshots are kept")
    args.add_argument("--epochs", type=int, default=1, help="of every training")
    args.add_argument("--limit", type=int, help="training images (default: all)")
    args.add_argument("--judge", type=int, help="test images (default: all)")
    args.add_argument("--seed", type=int, default=0)
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
