"""Seconds and memory of a joint plan after calibration, for models up to ViT-g, extrapolated from a few blocks.

    python -m bench.micro.planning [--model NAME ...] [--blocks 2 6] [--threads N] [--json FILE]

A model of so many blocks and statistics with decaying spectra are made up: the time does not depend on the images.
Every depth is planned in a process of its own, and what one block more takes is what all further blocks are said to
take. Seconds are those of all threads together, so that other work on the machine does not count; memory is what the
process's peak lies above where it stood with model and statistics.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import finish, parser, verdict
from vitlr.anatomy import linears
from vitlr.anatomy.attention import score_attentions
from vitlr.anatomy.mlps import find_mlps
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.calibration.sums import SUMS
from vitlr.checkpoint.creation import create_model
from vitlr.planning.planner import plan
from vitlr.runtime.storage import fingerprint

IMAGES, TOKENS = 500, 197
BUDGETS = ("params:80%", "params:60%")
WANTED = {  # CPU seconds on two cores, GB above the statistics
    "vit_base_patch16_224": (2 * 60.0, 2.0),
    "vit_large_patch16_224": (2 * 240.0, None),
    "vit_giant_patch14_dinov2": (2 * 1200.0, 12.0),
}


def spd(n: int, generator: torch.Generator) -> Tensor:
    """A second moment `[n, n]` whose eigenvalues decay over about three decades, as activations' do, and a floor."""
    scale = torch.logspace(0, -1.5, n)
    X = (torch.randn(n, n, generator=generator) * scale) @ torch.randn(n, n, generator=generator) / n
    moment = (X.mT @ X).double()
    moment.diagonal().add_(1e-6 * float(moment.diagonal().mean()))
    return moment


def made_up(model: nn.Module) -> Statistics:
    """Statistics of all that a joint plan with the objective fisher needs."""
    generator = torch.Generator().manual_seed(0)
    targets, tokens = linears.targets(model), IMAGES * TOKENS
    hidden = {mlp.linears[-1] for mlp in find_mlps(model).values()}
    queries = {a.queries_keys[0]: (a.heads, a.head_dim) for a in score_attentions(model, targets).values()}
    layers = {}
    for name, linear in targets.items():
        layer = LayerStatistics(name, linear.in_features, linear.out_features, name, tokens)
        words = {"owner", "loss", "fisher", layer.side}
        words |= {"hidden", "input_moment"} if name in hidden else set()
        words |= {"queries"} if name in queries else set()
        mean = torch.rand(linear.in_features, generator=generator, dtype=torch.float64) / linear.in_features**0.5
        for key, row in SUMS.items():
            shape = layer.shape(key, *queries.get(name, ()))
            if not row.asked(words):
                continue
            if len(shape) == 3:
                moment = torch.stack([spd(shape[-1], generator) for _ in range(shape[0])])
            else:
                moment = spd(shape[-1], generator) if len(shape) == 2 else torch.zeros(shape, dtype=torch.float64)
            setattr(layer, key, moment * tokens)
        layer.sum("input_sum").copy_(mean * tokens)
        if name in hidden:  # P = P' + mean ḡᵀ with P' ḡ = 0
            layer.sum("input_moment").add_(torch.outer(mean, mean), alpha=tokens)
            layer.sum("image_input_moment").add_(torch.outer(mean, mean), alpha=tokens)
            layer.sum("image_input_sum").copy_(mean * tokens)
            layer.sum("image_output_gradient").fill_(tokens)
        layers[name] = layer
    weights = fingerprint({name: linear.weight for name, linear in targets.items()})
    return Statistics(layers, weights, ("fisher",), ("hidden",), images=IMAGES, macs=10**9, input_shape=(3, 224, 224))


def resident() -> int:
    """Bytes of the process's memory now, in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes at most until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name: str, blocks: int) -> dict[str, float]:
    """What planning a model of so many blocks takes: CPU and wall seconds, bytes, CPU seconds of a second budget."""
    torch.manual_seed(0)
    model = create_model(name, depth=blocks).eval()
    stats = made_up(model)
    before = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    chosen = plan(model, stats, BUDGETS[0], method="joint")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    more = time.process_time()
    plan(model, stats, BUDGETS[1], method="joint", spectra=chosen.spectra)
    more = time.process_time() - more
    return {"cpu": cpu, "wall": wall, "bytes": max(0, peak() - before), "statistics": before, "again": more}


def measured(name: str, blocks: int, threads: int) -> dict[str, Any]:
    """`one` in a process of its own: peaks do not go down again."""
    call = [sys.executable, "-m", "bench.micro.planning", "--threads", str(threads), "--one", name, str(blocks)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--model", nargs="+", default=list(WANTED), help="timm models")
    args.add_argument(
        "--blocks", type=int, nargs=2, default=(2, 6), help="two depths to extrapolate from, not below the threads"
    )
    args.add_argument("--one", nargs=2, metavar=("MODEL", "BLOCKS"), help="only that, as JSON")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]))))
        return
    results: dict[str, object] = {}
    few, more = given.blocks
    for name in given.model:
        depth = len(create_model(name, pretrained=False).blocks)  # type: ignore[arg-type]
        found = {blocks: measured(name, blocks, given.threads) for blocks in (few, more)}
        slope = {key: (found[more][key] - found[few][key]) / (more - few) for key in found[few]}
        whole = {key: found[few][key] + (depth - few) * slope[key] for key in slope}
        for blocks, values in (*found.items(), (depth, whole)):
            print(
                f"{name:<26} {blocks:>3} blocks: {values['cpu']:8.1f} CPU s, {values['wall']:8.1f} s, "
                f"{values['bytes'] / 1e9:6.2f} GB; a second budget {values['again']:5.2f} CPU s"
            )
        row: dict[str, object] = {"depth": depth, "measured": found, "extrapolated": whole}
        seconds, gigabytes = WANTED.get(name, (None, None))
        if seconds is not None:
            row["seconds"] = verdict(f"{name}, CPU s", whole["cpu"], seconds, at_least=False)
        if gigabytes is not None:
            row["memory"] = verdict(f"{name}, GB", whole["bytes"] / 1e9, gigabytes, at_least=False)
        results[name] = row
    finish("planning", results, given.json)


if __name__ == "__main__":
    main()
