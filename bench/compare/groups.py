"""Groups with a step and a zero each against steps of rows and columns, at equal bytes, on the real ViT-Ti.

    python -m bench.compare.groups [--data FOLDER] [--stats FILE] [--images 400] [--json FILE]

Both are rounded in turn by the same two sides, and both move the bias; they differ in what is stored. A group of a row
has `2^bits` values, a step in float16 and a zero in as many bits, its range chosen by what columns weigh. Ours takes
for every layer the finest level that is no larger. Loss is `tr(S E C Eᵀ)` of all layers by the moments measured, KL
that of the whole network on calibration images that were not.
"""

from __future__ import annotations

import argparse
import copy
from bisect import bisect_left
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common import data_folder, finish, parser
from bench.compare.predictions import images, kl
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.roundings import Rounding
from vitlr.decomposition.sides import PRICED, Sides
from vitlr.ops.linalg.rounding import round_to_steps
from vitlr.planning.options import Planning
from vitlr.runtime import compact
from vitlr.runtime.modules import swap

BITS, GROUPS = (4, 3, 2), (32, 64, 192)  # no 128: it does not divide a row of 192
TRIES = 24  # ranges of a group


def ranges(weight: Tensor, bits: int, group: int, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero of every group [N, groups, 1]: the range that loses least, columns weighed [K]."""
    top, groups, weighed = 2**bits - 1, weight.unflatten(1, (-1, group)), columns.float().unflatten(0, (-1, group))
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    step, zero, least = torch.ones_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)
    for share in torch.linspace(1, 0.3, TRIES):
        s = ((high - low) * share / top).half().float().clamp(min=2.0**-24)
        z = (-low * share / s).round().clamp(0, top)
        codes = (groups / s + z).round().clamp(0, top)
        lost = (((codes - z) * s - groups).square() * weighed).sum(-1, True)
        step, zero, least = torch.where(lost < least, s, step), torch.where(lost < least, z, zero), least.minimum(lost)
    return step, zero


def grouped(found: Rounding, bits: int, group: int) -> tuple[Tensor, float]:
    """W rounded in turn to the values of its groups, and its bytes."""
    W = found.weight.float()
    step, zero = (x.expand(-1, -1, group).flatten(1) for x in ranges(W, bits, group, found.inputs.D))
    codes, _ = round_to_steps(W, step, *found.sides.factored(), 2**bits - 1 - zero, -zero)
    return codes * step, W.numel() * bits / 8 + W.numel() / group * (2 + bits / 8)


def levelled(found: Rounding, size: float) -> tuple[Tensor, float]:
    """W at the finest level that takes no more than `size` bytes, and what it takes."""
    levels = range(found.levels[0], found.levels[-1])  # from fine to coarse, each smaller than the one before
    level = levels[bisect_left(levels, True, key=lambda level: found.costs(level)[0] <= size)]
    low = found.rounded(level, found.weight, None)
    return low.dense_weight(), sum(p.nbytes for t in low.state_dict().values() for p in compact.stored(t).values())


def lost(found: Rounding, rounded: Tensor) -> float:
    """What the error costs, in nats."""
    S, C = found.sides.moments(PRICED)
    E = rounded.double() - found.weight.double()
    return float((S @ E @ C * E).sum())


@torch.no_grad()
def network(model: nn.Module, found: dict[str, Rounding], weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, biases moved by what the inputs' means make of the errors."""
    small = copy.deepcopy(model)
    for name, W in weights.items():
        linear = small.get_submodule(name)
        error = (linear.weight - W).double() @ found[name].sides.mean()
        fresh = nn.Linear(W.shape[1], W.shape[0])
        fresh.weight.copy_(W)
        fresh.bias.copy_(error if linear.bias is None else linear.bias + error)
        swap(small, name, fresh)
    return small


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    measured, judges = images(folder, model)
    if args.stats is not None and args.stats.is_file():
        stats = Statistics.load(args.stats)
    else:
        batches = measured[: args.images].split(40)
        stats = calibrate(model, batches, objective="loss", extras=("rounding",), hidden=False)
    objective, found = Objective.of(stats, Planning()), {}
    for name, layer in stats.layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found[name] = Rounding.of(name, Sides(layer, objective, linear.bias is not None), linear.weight)
    rows = []
    print("| bits | group | MB | loss: groups, ours | layers better | KL: groups, ours |\n|---|---|---|---|---|---|")
    for bits in args.bits:
        for group in GROUPS:
            theirs = {name: grouped(layer, bits, group) for name, layer in found.items()}
            own = {name: levelled(layer, theirs[name][1]) for name, layer in found.items()}
            losses = [[lost(found[name], W) for name, (W, _) in made.items()] for made in (theirs, own)]
            sizes = [sum(size for _, size in made.values()) for made in (theirs, own)]
            networks = (network(model, found, {name: W for name, (W, _) in made.items()}) for made in (theirs, own))
            apart = [kl(model, small, judges[: args.judges]) for small in networks]
            better = sum(ours < other for other, ours in zip(*losses, strict=True))
            rows.append({"bits": bits, "group": group, "bytes": sizes, "loss": [*map(sum, losses)], "kl": apart})
            cells = (bits, group, f"{sizes[0] / 1e6:.2f}, {sizes[1] / 1e6:.2f}")
            cells += (", ".join(f"{sum(each):.4f}" for each in losses), f"{better} of {len(found)}")
            print("| " + " | ".join(map(str, (*cells, ", ".join(f"{each:.4f}" for each in apart)))) + " |", flush=True)
    finish("groups", {"rows": rows}, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--images", type=int, default=400, help="calibration images that are measured")
    args.add_argument("--judges", type=int, default=200, help="images that judge")
    args.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    main(args.parse_args())
