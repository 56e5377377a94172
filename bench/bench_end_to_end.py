"""How much faster ViT-B is at `params:40%` with uniform ranks: compressed against dense, interleaved in one process.

    python bench/bench_end_to_end.py [--cases float32:8 float32:1 bfloat16:8] [--repeats 10] [--threads N] [--json FILE]

Random weights and images: ranks are uniform, so the time does not depend on them. The logits of the compressed model
are checked against those of its own dense product before anything is timed.
"""

from __future__ import annotations

import copy

import torch
from _common import finish, parser, verdict

from vitlr.cost import count_macs, count_params
from vitlr.models import create_model
from vitlr.pipeline import compress
from vitlr.surgery import fuse, to_dense
from vitlr.timing import compare

WANTED = {"float32": 1.85, "bfloat16": 1.80}


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--model", default="vit_base_patch16_224", help="a timm model of 224x224 images")
    args.add_argument("--budget", default="params:40%", help="what is kept")
    args.add_argument("--cases", nargs="+", default=["float32:8", "float32:1", "bfloat16:8"], help="dtype:batch size")
    args.add_argument("--repeats", type=int, default=10, help="rounds")
    args.add_argument("--fused", action="store_true", help="time the model with its MLPs fused as well")
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
        models = {"dense": dense, "small": small}
        if given.fused:
            models["fused"] = fuse(small)
        models = {key: copy.deepcopy(model).to(dtype) for key, model in models.items()}

        with torch.inference_mode():
            times = compare(
                {key: lambda m=model, x=x: m(x) for key, model in models.items()}, repeats=given.repeats, warmup=2
            )
        for key, t in times.items():
            speed = f"{size / t.min:6.1f} images/s"
            print(f"  {case:<12} {key:<6} min {t.min * 1e3:8.1f} ms  median {t.median * 1e3:8.1f} ms  {speed}")
        for key in list(models)[1:]:
            label = f"{name}, batch {size}: dense / {key}"
            results[label] = verdict(label, times["dense"].min / times[key].min, WANTED.get(name, 1.8), at_least=True)
    finish("end to end", results, given.json)


if __name__ == "__main__":
    main()
