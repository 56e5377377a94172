"""How much faster ViT-B is at half its parameters: narrower MLPs, with and without low-rank attention, against dense.

    python -m bench.micro.widths [--kept 0.5] [--batch-size 4] [--repeats 10] [--threads 1] [--json FILE]

Random weights and images: the time does not depend on which neurons or directions stay. In turns, in one process, on
CPU seconds: on one thread they are the time that a machine with nothing else to do would take.

    widths   every MLP keeps the same share of its neurons, all else is dense
    hybrid   60 % of the neurons stay, attention has uniform ranks
    ranks    all linears have uniform ranks
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.common import finish, parser, verdict
from vitlr.anatomy import linears
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.structure import restructure
from vitlr.measuring.cost import count_macs, count_params
from vitlr.nn import LowRankLinear
from vitlr.pruning import find_mlps, narrow_mlp

WANTED = 1.6  # dense over compressed, at half of the parameters
STEP = 16
HYBRID = 0.6  # of the neurons


def narrowed(model: nn.Module, share: float) -> nn.Module:
    """A copy whose MLPs keep `share` of their neurons."""
    model = copy.deepcopy(model)
    for mlp in find_mlps(model).values():
        narrow_mlp(mlp, torch.arange(max(STEP, int(share * mlp.width) // STEP * STEP)))
    return model


def ranked(model: nn.Module, limit: float, pattern: str | None = None) -> nn.Module:
    """A copy of at most `limit` parameters, all linears that match having uniform ranks."""
    shapes = {name: tuple(linear.weight.shape) for name, linear in linears.targets(model, include=pattern).items()}
    weights = sum(N * K for N, K in shapes.values())
    share = (limit - (count_params(model) - weights)) / weights
    layers = {
        name: {"rank": max(STEP, int(share * N * K / (N + K)) // STEP * STEP), "in_features": K, "out_features": N,
               "bias": model.get_submodule(name).bias is not None}
        for name, (N, K) in shapes.items()
    }  # fmt: skip
    model = restructure(copy.deepcopy(model), layers)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.reset_parameters()
    return model


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--model", default="vit_base_patch16_224", help="a timm model of 224x224 images")
    args.add_argument("--kept", type=float, default=0.5, help="share of the parameters")
    args.add_argument("--batch-size", type=int, default=4)
    args.add_argument("--repeats", type=int, default=10, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dense = create_model(given.model).eval()
    total = count_params(dense)
    limit = given.kept * total
    hidden = sum(linear.weight.numel() for linear in linears.targets(dense, include="mlp").values())
    models = {
        "dense": dense,
        "widths": narrowed(dense, 1 - (total - limit) / hidden),
        "hybrid": ranked(narrowed(dense, HYBRID), limit, "attn"),
        "ranks": ranked(dense, limit),
    }
    x = torch.randn(given.batch_size, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(given.repeats + 1):
            for name, model in models.items():
                taken = _seconds(model, x)
                if turn:  # the first round warms up
                    seconds[name].append(taken)
    results: dict[str, object] = {"model": given.model, "kept": given.kept, "batch_size": given.batch_size}
    for name, model in models.items():
        macs = count_macs(dense, x[:1]) / count_macs(model, x[:1])
        taken = statistics.median(seconds[name])
        print(f"  {name:<7} {count_params(model) / total:6.1%} of the parameters, MACs / {macs:.2f}, {taken:.3f} s")
        if name != "dense":
            ratio = statistics.median(d / s for d, s in zip(seconds["dense"], seconds[name], strict=True))
            results[name] = {**verdict(f"dense / {name}", ratio, WANTED, at_least=True), "mac_ratio": round(macs, 3)}
    finish("widths", results, given.json)


def _seconds(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.process_time()
    model(x)
    return time.process_time() - start


if __name__ == "__main__":
    main()
