"""Which losses to send back: targets drawn from the answer, or random directions of the same second moment.

    python -m bench.compare.probes [--model vit_tiny|dinov2] [--images 200 800] [--seeds 2] [--kinds NAME ...]

All have the Fisher matrix `F = diag p - p p^T` of the logits for the mean of their gradients' squares, p the answer at
temperature T (1 unless said); they differ in how far single ones scatter. A plan is made of each, and KL(dense, small)
is that of calibration images that were not measured, so that choices may be made by it. DINOv2 has a linear classifier
of CIFAR-10's classes for a head, fitted to images that are used for nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import BUILD, data_folder, parser
from bench.compare.frontier.subjects import DINOV2, SIZE, cifar
from bench.compare.predictions import images, kl
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.measuring.losses import contrasts, draws, image_seeds
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

BUDGETS = {"joint": ("params:80%", "params:60%", "params:50%"), "mix": ("bytes:8%",)}
Probe = Callable[[Tensor, list[int]], Tensor]


def drawn(p: Tensor, z: Tensor, seeds: list[int]) -> Tensor:
    """Cross entropy to a class drawn from p."""
    u = draws(seeds, 1, (1,), torch.rand)[0].double()
    target = torch.searchsorted(p.double().cumsum(-1), u).clamp_(max=p.shape[1] - 1).squeeze(-1)
    return F.cross_entropy(z, target, reduction="sum")


def along(p: Tensor, z: Tensor, noise: Tensor) -> Tensor:
    """`<w, z>` with `w = r - p sum(r)`, `r = sqrt(p) * noise`: E[w w^T] = diag p - p p^T."""
    r = p.sqrt() * noise
    return ((r - p * r.sum(-1, keepdim=True)) * z).sum()


def gaussian(p: Tensor, z: Tensor, seeds: list[int]) -> Tensor:
    return along(p, z, draws(seeds, 1, (z.shape[1],), torch.randn)[0])


def signs(p: Tensor, z: Tensor, seeds: list[int]) -> Tensor:
    return along(p, z, draws(seeds, 1, (z.shape[1],), torch.rand)[0].sub(0.5).sign())


def cholesky(p: Tensor, z: Tensor, seeds: list[int]) -> Tensor:
    """What calibration does: signs along the columns of F's Cholesky factor."""
    signs = draws(seeds, 1, (z.shape[1],), torch.rand)[0].sub(0.5).sign().double()
    return (contrasts(p.log(), signs).float() * z).sum()


KINDS: dict[str, tuple[Any, float]] = {
    "drawn": (drawn, 1.0),
    "Gaussian": (gaussian, 1.0),
    "signs": (signs, 1.0),
    "Cholesky": (cholesky, 1.0),
    "Cholesky, T = 2": (cholesky, 2.0),
}


def loss(kind: str, seed: int) -> Callable[[Tensor, Any], Tensor]:
    probe, temperature = KINDS[kind]

    def of(z: Tensor, batch: Any) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch[0]
        p = (z.detach().float() / temperature).softmax(-1)
        return probe(p, z.float(), image_seeds([x], seed))

    return of


def vit_tiny(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, the images to measure, and those that judge."""
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    return model, *images(folder, model)


def dinov2(folder: Path, weights: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of DINOv2, a classifier of CIFAR-10 fitted to 2000 images for its head."""
    model = create_model(DINOV2, num_classes=0, img_size=SIZE, checkpoint=weights).eval()
    cache = BUILD / "probes"
    cache.mkdir(parents=True, exist_ok=True)
    kept = cifar(folder, model, "train", 320, cache / "cifar.pt")
    x, y = (torch.stack(of) for of in zip(*((images, labels) for images, labels in kept), strict=True))  # by class
    fitted, pool, judges = x[:, :200].flatten(0, 1), x[:, 200:300].transpose(0, 1), x[:, 300:].transpose(0, 1)
    path = cache / "features.pt"
    if not path.is_file():
        with torch.inference_mode():
            torch.save(torch.cat([model(part) for part in fitted.split(50)]), path)
    features, truth = torch.load(path, weights_only=True).clone(), y[:, :200].flatten()
    head = nn.Linear(features.shape[1], 10)
    nn.init.zeros_(head.weight)
    steps = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        steps.zero_grad()
        lost = F.cross_entropy(head(features), truth) + 1e-3 * head.weight.square().sum()
        lost.backward()
        return lost

    steps.step(closure)
    model.head = head.requires_grad_(True)
    with torch.inference_mode():
        right = model(judges.flatten(0, 1)).argmax(1) == y[:, 300:].transpose(0, 1).flatten()
    print(f"a classifier of CIFAR-10: {right.float().mean():.1%} of the judging images", flush=True)
    return model, pool.flatten(0, 1), judges.flatten(0, 1)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model, pool, judges = vit_tiny(folder) if args.model == "vit_tiny" else dinov2(folder, args.dinov2)
    rows: list[dict[str, Any]] = json.loads(args.json.read_text())["rows"] if args.json and args.json.is_file() else []
    for count in args.images:
        for seed in range(args.seeds):
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            taken = pool[order[:count].sort().values]
            for kind in args.kinds:
                if any((r["images"], r["seed"], r["kind"]) == (len(taken), seed, kind) for r in rows):
                    continue
                start = time.process_time()
                how: dict[str, Any] = {
                    "objective": ("fisher", "loss"),
                    "hidden": True,
                    "extras": ("rounding",) * ("mix" in args.methods),
                }
                stats = calibrate(model, list(taken.split(40)), loss_fn=loss(kind, seed), **how)
                for method in args.methods:
                    known = None
                    for budget in BUDGETS[method]:
                        chosen = plan(model, stats, budget, method=method, spectra=known)
                        known = chosen.spectra
                        lost = kl(model, apply(model, chosen), judges)
                        row = {"kind": kind, "images": len(taken), "seed": seed, "method": method, "budget": budget}
                        rows.append(
                            {**row, "predicted": chosen.error, "kl": lost, "seconds": time.process_time() - start}
                        )
                        print(rows[-1], flush=True)
                if args.json:
                    args.json.write_text(json.dumps({"rows": rows}))


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path)
    args.add_argument("--model", choices=("vit_tiny", "dinov2"), default="vit_tiny")
    args.add_argument(
        "--dinov2", type=Path, help="weights of DINOv2 at 112 pixels, as bench.compare.frontier keeps them"
    )
    args.add_argument("--images", type=int, nargs="*", default=[200, 800])
    args.add_argument("--seeds", type=int, default=2)
    args.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    args.add_argument("--methods", nargs="*", default=list(BUDGETS), choices=BUDGETS)
    main(args.parse_args())
