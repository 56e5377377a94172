"""What calibration of ViT-B costs beyond the passes it rides on: time, and peak memory in a process of its own.

    python -m bench.micro.calibrate [--images 64] [--batch-size 8] [--repeats 3] [--threads N] [--json FILE]

Activations only is compared with the plain forward passes; with gradient moments with forward and backward passes
that compute the gradients of the linears' inputs and of no weight. Any weights will do, so they are random. Whole
calls are timed, with the probe of one image and the fingerprint of the weights; the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import BUILD, finish, parser, peak_bytes, verdict
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.measuring.timing import compare

ALLOWED_MB = 750


def batches(images: int, batch_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    return [torch.randn(size, 3, 224, 224, generator=generator) for size in sizes]


def variants(model: nn.Module, loader: list[Tensor]) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        with torch.no_grad():
            for x in loader:
                model(x)

    def backward() -> None:
        # From the first linear's input on, as calibration does: nothing before it asks for a gradient.
        handle = model.blocks[0].register_forward_pre_hook(
            lambda _, args: (args[0].detach().requires_grad_(), *args[1:])
        )
        try:
            for x in loader:
                logits = model(x)
                F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum").backward()
        finally:
            handle.remove()

    return {
        "forward": forward,
        "calibrate output": lambda: calibrate(model, loader, objective="output", hidden=False),
        "forward+backward": backward,
        "calibrate loss": lambda: calibrate(model, loader, objective="loss", hidden=False),
        "calibrate fisher": lambda: calibrate(model, loader, objective="fisher", hidden=False),
        "calibrate fisher, hidden": lambda: calibrate(model, loader, objective="fisher", hidden=True),
        "calibrate fisher, hidden, in a file": lambda: calibrate(
            model, loader, objective="fisher", hidden=True, sums_in=str(BUILD)
        ),
    }


def peak(given: argparse.Namespace, variant: str) -> float:
    """MB that a fresh process peaks at when it runs one variant."""
    command = [sys.executable, "-m", __spec__.name, "--only", variant, "--model", given.model]
    command += ["--threads", str(given.threads)]
    command += ["--images", str(min(given.images, 2 * given.batch_size)), "--batch-size", str(given.batch_size)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["peak"] / 1e6


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--model", default="vit_base_patch16_224", help="a plain timm ViT (with .blocks)")
    args.add_argument("--images", type=int, default=64, help="images of each call")
    args.add_argument("--batch-size", type=int, default=8, help="images of a batch")
    args.add_argument("--repeats", type=int, default=3, help="rounds")
    args.add_argument("--only", metavar="VARIANT", help="run one variant once and print its peak memory")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    BUILD.mkdir(exist_ok=True)
    model = create_model(given.model).requires_grad_(False)
    runs = variants(model, batches(given.images, given.batch_size))
    if given.only:
        runs[given.only]()
        print(json.dumps({"peak": peak_bytes()}))
        return
    times = compare(runs, repeats=given.repeats, warmup=1)
    results: dict[str, object] = {"model": given.model, "images": given.images, "batch_size": given.batch_size}
    results["seconds"] = {name: t.min for name, t in times.items()}
    for name, t in times.items():
        print(f"{name:<18} min {t.min:8.2f} s   median {t.median:8.2f} s   {given.images / t.min:7.1f} images/s")
    for ours in runs:
        if not ours.startswith("calibrate"):
            continue
        plain = "forward" if ours == "calibrate output" else "forward+backward"
        results[f"{ours} / {plain}"] = verdict(
            f"{ours} / {plain}", times[ours].min / times[plain].min, 1.35, at_least=False
        )
        used, base = peak(given, ours), peak(given, plain)
        met = used - base <= ALLOWED_MB
        print(f"  peak memory {used:.0f} MB against {base:.0f} MB: +{used - base:.0f} MB, wanted <= +{ALLOWED_MB} MB: "
              f"{'met' if met else 'NOT MET'}")  # fmt: skip
        results[f"{ours} memory"] = {"MB": round(used), "plain MB": round(base), "allowed": ALLOWED_MB, "met": met}
    finish("calibrate", results, given.json)


if __name__ == "__main__":
    main()
