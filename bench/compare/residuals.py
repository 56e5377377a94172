"""What a compact residual does to a real ViT-Ti: output error, size and agreement for every form and rank.

    python -m bench.compare.residuals [--data FOLDER] [--json FILE]

Factors and codes come from 64 calibration images; errors and logits are measured on 100 others. The error is the root
mean square over the 48 linears of `√(Σ ‖(W - Ŵ) x‖² / Σ ‖W x‖²)`, all parts in bf16 except the codes. r = 0 is round
to nearest: the same codes and the same search for scales, but no low-rank part and no statistics. `rounded` is what
`method="bits"` makes of the same images in at most the bytes of the row above, layer by layer.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common import data_folder, finish, parser
from vitlr.anatomy.reading import Parts, read
from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import ROUNDING
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.data.loader import open_data
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.roundings import Rounding
from vitlr.decomposition.sides import Sides
from vitlr.measuring.evaluation import evaluate
from vitlr.nn import QuantizedLinear, ResidualLowRankLinear
from vitlr.ops.layers.codes import dequantise
from vitlr.ops.linalg.residuals import quantise
from vitlr.planning.options import Planning

VARIANTS = [("bf16", 0), *[(form, rank) for form in ("int8", "int4", "fp8") for rank in (0, 8, 16, 32)]]
RIVALS = {("int4", 0), ("int4", 8), ("int4", 16), ("int4", 32)}  # after which `rounded` has its turn
GROUP = 64
COLUMNS = ("form", "r", "error %", "of bf16's bytes", "KL", "agreement %")


def approximate(linear: nn.Linear, form: str, rank: int, layer: LayerStatistics) -> tuple[Tensor, int]:
    """The weight that a variant multiplies with, in float64, and the bytes that it stores."""
    W = linear.weight.detach()
    if form == "bf16":
        return W.bfloat16().double(), 2 * W.numel()
    if rank == 0:
        codes, scale = quantise(W.double(), form, GROUP, torch.bfloat16)
        return dequantise(codes, scale.double(), form, GROUP, W.shape[1]), codes.nbytes + scale.nbytes
    low = ResidualLowRankLinear.from_linear(linear, rank, form, GROUP, layer, torch.bfloat16)
    B, A, own = low.down.weight.detach(), low.up.weight.detach(), low.scale
    assert own is not None
    found = A.double() @ B.double() + dequantise(low.codes, own.double(), form, GROUP, W.shape[1])
    return found, sum(part.nbytes for part in (A, B, low.codes, own))


def rounded(name: str, parts: Parts, stats: Statistics, size: int) -> tuple[QuantizedLinear, int]:
    """The layer at the finest level that takes no more than `size` bytes, and what it is predicted to take."""
    linear = parts.linears[name]
    sides = Sides(stats.layers[name], Objective.of(stats, Planning()), linear.bias is not None)
    found = Rounding.of(name, sides, linear.weight)
    level = next((level for level, (taken, _) in found.ladder.items() if taken <= size), found.levels[-1])
    low = found.rounded(level, linear.weight, linear.bias)
    return low, round(found.ladder[level][0])


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the real inputs")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    folder = data_folder(given.data)
    weights = folder / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    model = create_model("vit_tiny_patch16_224", checkpoint=weights)
    tar, synsets = folder / "imagenet_calibration_1000.tar", folder / "imagenet_synsets.txt"
    stats = calibrate(model, open_data(tar, model, limit=64, batch_size=32), extras=(ROUNDING,), hidden=False)
    parts = read(model)
    loader = open_data(tar, model, class_map=synsets, skip=200, limit=100, batch_size=50, need_labels=True)
    others = list(loader)
    seen = calibrate(model, others, objective="output", extras=("input_moment",), hidden=False)
    rows = []
    print("  ".join(f"{name:>15}" for name in COLUMNS))
    sizes: dict[str, int] = {}
    for form, rank in (one for own in VARIANTS for one in ([own, ("rounded", own[1])] if own in RIVALS else [own])):
        small, errors, taken, dense = copy.deepcopy(model), [], 0, 0
        for name, layer in stats.layers.items():
            linear, target = parts.linears[name], small.get_submodule(name)
            assert isinstance(target, nn.Linear)
            W = linear.weight.detach().double()
            if form == "rounded":
                low, size = rounded(name, parts, stats, sizes[name])
                found = low.dense_weight().detach().double()
                if low.bias is not None:
                    target.bias.data = low.bias.detach()
            else:
                found, size = approximate(linear, form, rank, layer)
            sizes[name] = size
            C = seen.layers[name].sum("input_moment")
            errors.append(float(((W - found) @ C * (W - found)).sum() / (W @ C * W).sum()))
            taken, dense = taken + size, dense + 2 * W.numel()
            target.weight.data = found.float()
        metrics = evaluate(small, others, model)
        error = 100 * math.sqrt(sum(errors) / len(errors))
        row = (form, rank, error, taken / dense, metrics.kl, metrics.agreement)
        print(
            f"{form:>15}  {rank:15d}  {error:15.3f}  {taken / dense:15.3f}  {row[4]:15.5f}  {row[5]:15.1f}", flush=True
        )
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    finish("compare_residuals", {"rows": rows}, given.json)


if __name__ == "__main__":
    main()
