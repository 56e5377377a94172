"""Which losses to send back: a class drawn from the answer, or random directions of the same second moment.

    python -m bench.compare.probes [--model vit_tiny|dinov2] [--images 200] [--seeds 2] [--kinds NAME ...] [--json FILE]
    python -m bench.compare.probes --scatter

All have the Fisher matrix `F = diag p - p p^T` of the logits, p the answer, for the mean of their gradients' squares;
they differ in how far single ones scatter, which the second prints: `(E|w w^T - F|^2)^(1/2) / |F|`. The first makes
joint plans of each, and KL(dense, small) is that of calibration images that were not measured, so that choices may be
made by it. DINOv2 has a linear classifier of CIFAR-10's classes for a head, fitted to images used for nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import BUILD, data_folder, machine, parser, write_json
from bench.compare.frontier.subjects import DINOV2, SIZE, cifar
from bench.compare.predictions import images, kl
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.measuring.losses import contrasts, draws, image_seeds
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

BUDGETS = ("params:80%", "params:60%", "params:50%")
SCATTERED = ((2, 1.0), (7, 2.0), (100, 4.0))  # classes, and the deviation of their Gaussian logits


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


def eigenvectors(p: Tensor, z: Tensor, seeds: list[int]) -> Tensor:
    """Signs along F's eigenvectors: no draw scatters less."""
    values, vectors = torch.linalg.eigh(torch.diag_embed(p.double()) - p.double()[:, :, None] * p.double()[:, None])
    sign = draws(seeds, 1, (z.shape[1],), torch.rand)[0].sub(0.5).sign().double()
    return ((vectors * (values.clamp(min=0).sqrt() * sign)[:, None]).sum(-1).float() * z).sum()


KINDS = {"drawn": drawn, "Gaussian": gaussian, "signs": signs, "Cholesky": cholesky, "eigenvectors": eigenvectors}


def loss(kind: str, seed: int) -> Callable[[Tensor, Any], Tensor]:
    def of(z: Tensor, batch: Any) -> Tensor:
        x = batch if isinstance(batch, Tensor) else batch[0]
        return KINDS[kind](z.detach().float().softmax(-1), z.float(), image_seeds([x], seed))

    return of


def scatter(count: int = 1500) -> None:
    """How far single draws lie from their mean, for one answer of each kind."""
    for classes, deviation in SCATTERED:
        z = deviation * torch.randn(1, classes, generator=torch.Generator().manual_seed(0))
        p = z.softmax(-1)
        fisher = p[0].diag() - p[0][:, None] * p[0]
        for kind, probe in KINDS.items():
            apart = 0.0
            for seed in range(count):
                leaf = z.clone().requires_grad_()
                (w,) = torch.autograd.grad(probe(p, leaf, [seed]), leaf)
                apart += float((w[0][:, None] * w[0] - fisher).square().sum())
            print(f"{classes:>4} classes  {kind:<14} {(apart / count) ** 0.5 / float(fisher.norm()):.2f}", flush=True)


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


def rows_of(model: nn.Module, pool: Tensor, judges: Tensor, kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One calibration, and what its plans lose."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    taken = pool[order[:count].sort().values]
    stats = calibrate(model, list(taken.split(40)), loss_fn=loss(kind, seed), hidden=True)
    rows, known = [], None
    for budget in BUDGETS:
        chosen = plan(model, stats, budget, method="joint", spectra=known)
        known = chosen.spectra
        row = {"kind": kind, "images": len(taken), "seed": seed, "budget": budget, "predicted": chosen.error}
        rows.append({**row, "kl": kl(model, apply(model, chosen), judges)})
        print(rows[-1], flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.scatter:
        return scatter()
    folder = data_folder(args.data)
    model, pool, judges = vit_tiny(folder) if args.model == "vit_tiny" else dinov2(folder, args.dinov2)
    rows: list[dict[str, Any]] = []
    for count in args.images:
        for seed in range(args.seeds):
            for kind in args.kinds:
                rows += rows_of(model, pool, judges, kind, count, seed)
                if args.json:
                    write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--model", choices=("vit_tiny", "dinov2"), default="vit_tiny")
    args.add_argument("--dinov2", type=Path, help="its weights at 112 pixels, as bench.compare.frontier keeps them")
    args.add_argument("--images", type=int, nargs="*", default=[200], help="calibration images that are measured")
    args.add_argument("--seeds", type=int, default=2, help="draws of images and of losses")
    args.add_argument("--kinds", nargs="*", default=["drawn", "Gaussian", "signs", "Cholesky"], choices=KINDS)
    args.add_argument("--scatter", action="store_true", help="print how far single draws scatter, and no more")
    main(args.parse_args())
