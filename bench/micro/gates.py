"""How much faster removed channels make a ViT: by kinds of gates, by tile, at half of the parameters.

    python -m bench.micro.gates [--model vit_small_patch16_224] [--kept params:50%] [--batch-size 8] [--threads 1]

Gates are drawn, not learnt: training decides which channels go, their number what running costs. Models take turns in
one process; the ratio is that of their fastest turns to the dense one's, in CPU seconds of the process, which a busy
machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import time

import timm
import torch

from bench.common import finish, parser
from vitlr.measuring import cost
from vitlr.pruning.gated import cut_off
from vitlr.pruning.gates import add_gates, gates
from vitlr.pruning.thresholds import choose

KINDS = ("qkv,proj,fc1,fc2", "proj,fc2", "fc1,fc2")
TILES = (1, 16)


def pruned(model: torch.nn.Module, kinds: str, tile: int, kept: str) -> torch.nn.Module:
    """The model without the channels that gates drawn at random say."""
    gated = add_gates(model, kinds)
    for gate in gates(gated).values():
        gate.a.data = torch.rand_like(gate.a)
    return cut_off(gated, choose(gated, budget=kept, tile=tile)).eval()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dense = timm.create_model(args.model).eval()
    images = torch.randn(args.batch_size, *dense.default_cfg["input_size"])
    models = {"dense": dense}
    models |= {f"{kinds}, tile {tile}": pruned(dense, kinds, tile, args.kept) for kinds in KINDS for tile in TILES}
    best = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for _ in range(args.repeats):
            for name, model in models.items():
                start = time.process_time()
                model(images)
                best[name] = min(best[name], time.process_time() - start)
    results = {}
    before = cost.measure(dense, images.shape[1:])
    for name, model in models.items():
        after = cost.measure(model, images.shape[1:])
        results[name] = {
            "params": after.params / before.params,
            "macs": after.macs / before.macs,
            "ms": best[name] * 1e3,
            "faster": best["dense"] / best[name],
        }
        row = results[name]
        print(
            f"{name:<26}{row['params']:>8.1%}{row['macs']:>8.1%}{row['ms']:>9.1f} ms{row['faster']:>7.2f}x", flush=True
        )
    settings = {"model": args.model, "kept": args.kept, "batch_size": args.batch_size}
    finish("gates", {**settings, "rows": results}, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--model", default="vit_small_patch16_224", help="a timm name")
    args.add_argument("--kept", default="params:50%", help="what is kept of the parameters")
    args.add_argument("--batch-size", type=int, default=8, help="images in a batch")
    args.add_argument("--repeats", type=int, default=10, help="turns")
    main(args.parse_args())
