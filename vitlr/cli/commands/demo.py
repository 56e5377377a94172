"""`vitlr demo`: train a small ViT on scikit-learn's digits, compress it, measure what it cost and brought.

Nothing is downloaded. `run` is what a user writes (calibrate, plan, apply, save, load); the rest trains and measures.
"""

from __future__ import annotations

import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.calibration.loop import calibrate
from vitlr.checkpoint import files
from vitlr.checkpoint.creation import create_model
from vitlr.cli.result import table
from vitlr.errors import InputError, RunError
from vitlr.measuring import cost, timing
from vitlr.measuring.evaluation import evaluate
from vitlr.planning.planner import plan
from vitlr.runtime.places import check_writable
from vitlr.runtime.progress import bar
from vitlr.surgery.application import apply

SHAPE = (1, 8, 8)
_TEST = 450  # of 1797 images
_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """How much is done. Low rank needs wide layers to pay in time; a width of 384 is that of ViT-S."""

    name: str = "vit_small_patch16_224"
    width: int = 384
    depth: int = 4
    heads: int = 6
    epochs: int = 8
    calibration: int = 512
    budgets: tuple[str, ...] = ("params:50%", "params:25%")
    batch_sizes: tuple[int, ...] = (1, 64)
    repeats: int = 30
    threads: int = 1  # matrices this small gain nothing from more, and waiting for one on a busy machine costs minutes

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`: one channel, four patches of 4x4 pixels, ten digits."""
        shape = {"img_size": SHAPE[1], "patch_size": 4, "in_chans": SHAPE[0], "num_classes": 10}
        return {**shape, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}


QUICK = Settings(width=96, depth=2, heads=3, epochs=6, calibration=128, batch_sizes=(64,))


@dataclass(frozen=True)
class Digits:
    """Handwritten digits as `[B, 1, 8, 8]` in [-1, 1]; the test images are measured on and never trained on."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def run(*, quick: bool = False, out: Path | None = None, json: bool = False) -> dict[str, Any]:
    """Run the demo and return its figures as plain values; the table goes to stdout unless `json`.

    `quick` trains a much smaller model (it shows that everything works, not what it brings); `out` is a folder that
    keeps the files, and the digits as images in `train` and `test`. Raises `InputError` where scikit-learn is missing
    or `out` cannot be written.
    """
    start = time.perf_counter()
    settings = QUICK if quick else Settings()
    digits = load_digits()
    with _folder(out) as folder, torch.random.fork_rng(devices=[]), _threads(settings.threads):
        torch.manual_seed(0)
        dense = train(create_model(settings.name, **settings.args), digits, settings.epochs)
        models = {"dense": dense}
        with bar("calibrating", settings.calibration) as progress:
            stats = calibrate(dense, digits.train[: settings.calibration].split(_BATCH), progress=progress)
        plans = {}
        for budget in settings.budgets:
            with bar(f"{budget}: planning", None, "layers") as progress:
                plans[budget] = plan(dense, stats, budget, progress=progress)
            models[budget] = apply(dense, plans[budget])
        paths = {name: folder / f"{name.replace(':', '_').replace('%', '')}.safetensors" for name in models}
        for name, model in models.items():
            files.save(model, paths[name], plan=plans.get(name))
        if out is not None:
            write_images(digits.train, digits.train_labels, folder / "train")
            write_images(digits.test, digits.test_labels, folder / "test")
        # From here on only what came back from the files is measured.
        loaded = {name: files.load(path) for name, path in paths.items()}
        for name, model in models.items():
            _check_identical(model, loaded[name], digits.test, paths[name])
        rows = measure(loaded, digits, settings)
        for row in rows:
            row["bytes"] = paths[row["model"]].stat().st_size
        threads = torch.get_num_threads()
    result = {
        "quick": quick,
        "architecture": {"name": settings.name, **settings.args},
        "train_images": len(digits.train),
        "calibration_images": settings.calibration,
        "test_images": len(digits.test),
        "threads": threads,
        "reloaded_identical": True,
        "out": None if out is None else str(out),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    if not json:
        _show(result, settings)
    return result


def load_digits() -> Digits:
    """scikit-learn's 1797 digits (8x8 pixels), split the same way every time, classes in proportion."""
    try:
        from sklearn.datasets import load_digits as bundled
        from sklearn.model_selection import train_test_split
    except ImportError as cause:
        raise InputError("vitlr demo takes its images from scikit-learn; pip install 'vitlr[demo]'") from cause
    pixels, labels = bundled(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=_TEST, stratify=labels, random_state=0)
    train_pixels, test_pixels = (torch.tensor(p, dtype=torch.float32).view(-1, *SHAPE) / 8 - 1 for p in parts[:2])
    train_labels, test_labels = (torch.tensor(p, dtype=torch.int64) for p in parts[2:])
    return Digits(train_pixels, train_labels, test_pixels, test_labels)


def write_images(images: Tensor, labels: Tensor, folder: Path) -> None:
    """Each image as `<digit>/<number>.png`, so that the other commands have something to read."""
    from PIL import Image

    for i, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((pixels[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(place / f"{i}.png")


def train(model: nn.Module, digits: Digits, epochs: int, *, lr: float = 1e-3, seed: int = 0) -> nn.Module:
    """Train with AdamW, a one-cycle rate and smoothed labels, for a fixed number of epochs; returned in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Linear):  # timm's 0.02 suits pretraining; a few hundred steps need more
            nn.init.xavier_uniform_(module.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = len(digits.train) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    with torch.enable_grad(), bar("training", epochs, "epochs") as progress:
        for epoch in range(epochs):
            order = torch.randperm(len(digits.train), generator=generator)[: steps * _BATCH]
            for chosen in order.split(_BATCH):
                optimizer.zero_grad()
                criterion(model(digits.train[chosen]), digits.train_labels[chosen]).backward()
                optimizer.step()
                schedule.step()
            progress(epoch + 1, epochs)
    return model.eval()


def measure(models: dict[str, nn.Module], digits: Digits, settings: Settings) -> list[dict[str, Any]]:
    """Accuracy on the test images, agreement with dense, cost, and speed relative to dense, measured in turns."""
    loader = list(zip(digits.test.split(_BATCH), digits.test_labels.split(_BATCH), strict=True))
    speeds = {}
    with bar("timing", len(settings.batch_sizes), "batch sizes") as progress:
        for done, size in enumerate(settings.batch_sizes, 1):
            speeds[size] = timing.throughput(models, size, input_size=SHAPE, repeats=settings.repeats)
            progress(done, len(settings.batch_sizes))
    rows = []
    for name, model in models.items():
        found = evaluate(model, loader, models["dense"])
        costs = cost.measure(model, SHAPE)
        row = {"model": name, **found.to_dict(), "params": costs.params, "macs": costs.macs}
        row["speedup"] = {str(b): t["dense"]["batch_ms"] / t[name]["batch_ms"] for b, t in speeds.items()}
        rows.append(row)
    return rows


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where the files go: `out`, made and tried before any work is done, or a folder that vanishes afterwards."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="vitlr-demo-") as temporary:
            yield Path(temporary)
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"cannot make the folder {out}: {cause.strerror or cause}; choose another --out") from cause
    check_writable(Path(out) / "dense.safetensors")
    yield Path(out)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_identical(model: nn.Module, loaded: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad():
        if not torch.equal(model(images), loaded(images)):
            raise RunError(f"{path}: the reloaded model gives other logits than the one that was saved")


def _show(result: dict[str, Any], settings: Settings) -> None:
    dense = result["rows"][0]
    header = ["model", "top-1 (95 %)", "agree", "params", "MB", "MMACs", *(f"b{size}" for size in settings.batch_sizes)]
    rows = []
    for row in result["rows"]:
        cells = [row["model"], f"{row['top1']:.2f} ({row['top1_low']:.1f}-{row['top1_high']:.1f})"]
        cells += [f"{row['agreement']:.1f}", f"{row['params'] / 1e6:.2f}M {row['params'] / dense['params']:.0%}"]
        cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['macs'] / 1e6:.1f}"]
        rows.append([*cells, *(f"{ratio:.2f}x" for ratio in row["speedup"].values())])
    sizes = " and ".join(map(str, settings.batch_sizes))
    easy = (
        "Digits are easy and this model is far too large for them: a pretrained ViT loses more, see docs/measured.md."
    )
    small = "--quick shows that everything works; the model is too small for low rank to pay."
    words = (
        f"Trained on {result['train_images']} images, calibrated on {result['calibration_images']} of them without "
        f"labels, not trained after compression. agree: same answer as dense, %. b: speed against dense in batches of "
        f"{sizes}, threads: {result['threads']}, fastest of {settings.repeats} turns. "
        "Reloaded files give bit-identical logits."
    )
    title = f"ViT of width {settings.width}, {settings.depth} blocks, on {result['test_images']} test digits"
    lines = [title, "", table(header, rows), "", textwrap.fill(words, 80, break_on_hyphens=False)]
    lines += [textwrap.fill(small if result["quick"] else easy, 80), f"{result['seconds']:.0f} s in all."]
    if result["out"]:
        there = result["out"]
        lines += [f"Files and images are in {there}. To go on:"]
        lines += [
            f"vitlr frontier {there}/dense.safetensors --data {there}/train \\",
            f"    --val {there}/test --out {there}/frontier",
        ]
    print("\n".join(lines))
