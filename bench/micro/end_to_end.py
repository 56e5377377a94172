"""How much faster ViT-B is at `params:40%` with uniform ranks: compressed against dense, interleaved in one process.

    python -m bench.micro.end_to_end [--cases float32:8 float32:1 bfloat16:8] [--repeats 10] [--threads N] [--json FILE]

Random weights and images: ranks are uniform, so the time does not depend on them. The logits of the compressed model
are checked against those of its own dense product before anything is timed. In turns: the dense model, the compressed
one on plain torch linears, and the same with its MLPs fused, on the kernels that dispatch chooses.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.common import finish, parser, verdict
from vitlr.checkpoint.creation import create_model
from vitlr.compression import compress
from vitlr.measuring.cost import count_macs, count_params
from vitlr.measuring.timing import compare
from vitlr.ops.dispatch.registry import VARIABLE
from vitlr.surgery.fusion import fuse, to_dense

WANTED = {"float32": {"plain": 1.85, "fused": 2.15}, "bfloat16": {"plain": 1.80, "fused": 2.25}}  # dense over it
WANTED_OF_FUSED = 1.1  # plain over fused


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--model", default="vit_base_patch16_224", help="a timm model of 224x224 images")
    args.add_argument("--budget", default="params:40%", help="what is kept")
    args.add_argument("--cases", nargs="+", default=["float32:8", "float32:1", "bfloat16:8"], help="dtype:batch size")
    args.add_argument("--repeats", type=int, default=10, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dense = create_model(given.model)
    images = torch.randn(8, 3, 224, 224)
    small = compress(dense, [images], given.budget, objective="output", uniform=True)
    with torch.no_grad():
        product = to_dense(small)(images)
        difference = float((small(images) - product).abs().max() / product.abs().max())
    if difference > 1e-3:
        raise SystemExit(
            f"compressed and multiplied-out logits differ by {difference:.1e} of the largest; nothing is timed"
        )
    one = images[:1]
    ratio = count_macs(dense, one) / count_macs(small, one)
    kept = count_params(small) / count_params(dense)
    print(f"{given.model} at {given.budget}: parameters {kept:.1%}, MAC ratio {ratio:.2f}")
    results: dict[str, object] = {"model": given.model, "budget": given.budget, "mac_ratio": round(ratio, 4)}
    for case in given.cases:
        name, _, batch = case.partition(":")
        dtype, size = getattr(torch, name), int(batch)
        x = torch.randn(size, 3, 224, 224, dtype=dtype)
        models = {"dense": dense, "plain": small, "fused": fuse(small)}
        functions = {key: _call(copy.deepcopy(model).to(dtype), x, key == "plain") for key, model in models.items()}
        with torch.inference_mode():
            times = compare(functions, repeats=given.repeats, warmup=2)
        for key, t in times.items():
            speed = f"{size / t.min:6.1f} images/s"
            print(f"  {case:<12} {key:<6} min {t.min * 1e3:8.1f} ms  median {t.median * 1e3:8.1f} ms  {speed}")
        for key, wanted in WANTED.get(name, WANTED["float32"]).items():
            label = f"{name}, batch {size}: dense / {key}"
            results[label] = verdict(label, times["dense"].min / times[key].min, wanted, at_least=True)
        label = f"{name}, batch {size}: plain / fused"
        ratio = times["plain"].min / times["fused"].min
        results[label] = verdict(label, ratio, WANTED_OF_FUSED, at_least=True)
    finish("end to end", results, given.json)


def _call(model: nn.Module, x: Tensor, plain: bool) -> Callable[[], Tensor]:
    """A function that runs the model, on plain torch alone if `plain`."""

    def run() -> Tensor:
        with patch.dict(os.environ, {VARIABLE: "torch"} if plain else {}):
            return model(x)

    return run


if __name__ == "__main__":
    main()
