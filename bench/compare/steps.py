"""What steps that learn could bring: the real steps of rows or columns that lose least with the codes as rounded.

    python -m bench.compare.steps [--data FOLDER] [--stats FILE] [--images 400] [--bits 2.3 3]

`tr(S (W - diag(a) Ŵ) C (W - diag(a) Ŵ)ᵀ)` is least where `(S ∘ Ŵ C Ŵᵀ) a = diag(S W C Ŵᵀ)`, and likewise for columns:
no learning of steps alone does better by this metric. Shares of the loss of all linears of the ViT-Ti.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common import data_folder, finish, parser
from bench.compare.predictions import images
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.roundings import Rounding
from vitlr.decomposition.sides import PRICED, Sides
from vitlr.planning.options import Planning

_RIDGE = 1e-9  # of the mean diagonal


def losses(found: Rounding, bits: float) -> dict[str, float]:
    """Of a linear as rounded to about so many bits a weight, and with the best steps."""
    W, (S, C) = found.weight.double(), found.sides.moments(PRICED)
    level = min(found.levels, key=lambda level: abs(8 * found.costs(level)[0] / W.numel() - bits))
    V = found.rounded(level, found.weight, None).dense_weight(torch.float64)
    seen = (S @ W @ C) * V
    rows, columns = best(S * (V @ C @ V.mT), seen.sum(1)), best(C * (V.mT @ S @ V), seen.sum(0))
    stored = torch.exp2((8 * rows.clamp_min(1e-3).log2()).round() / 8)
    kinds = {"rounded": V, "rows": rows[:, None] * V, "columns": V * columns, "rows in eighths": stored[:, None] * V}
    return {kind: float((S @ (W - R) @ C * (W - R)).sum()) for kind, R in kinds.items()}


def best(A: Tensor, b: Tensor) -> Tensor:
    """The solution of `A x = b`, A positive semidefinite."""
    return torch.linalg.solve(A + _RIDGE * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype), b)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    if args.stats is not None and args.stats.is_file():
        stats = Statistics.load(args.stats)
    else:
        batches = images(folder, model)[0][: args.images].split(40)
        stats = calibrate(model, batches, objective="loss", extras=("rounding",), hidden=False)
    objective, results = Objective.of(stats, Planning()), {}
    for bits in args.bits:
        total: dict[str, float] = {}
        for name, layer in stats.layers.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found = Rounding.of(name, Sides(layer, objective, linear.bias is not None), linear.weight)
            for kind, lost in losses(found, bits).items():
                total[kind] = total.get(kind, 0.0) + lost
        results[str(bits)] = total
        saved = (f"{kind} {1 - lost / total['rounded']:.2%}" for kind, lost in total.items() if kind != "rounded")
        print(f"{bits:g} bits: {total['rounded']:.4f} nats; saved by {', '.join(saved)}", flush=True)
    finish("steps", results, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--images", type=int, default=400, help="calibration images that are measured")
    args.add_argument("--bits", type=float, nargs="+", default=[2.3, 3.0])
    main(args.parse_args())
