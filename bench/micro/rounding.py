"""Time all of ViT-B rounded at one bit width: every level of every layer priced, the plan, the codes, the file.

    python -m bench.micro.rounding [--bits 4] [--depth 12] [--method bits] [--threads 2] [--json FILE]

Random weights and moments with decaying spectra: the time does not depend on the images. VITLR_ROUNDING=torch rounds
in plain torch.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from bench.common import finish, parser, peak_bytes, verdict
from bench.micro.decompose import spd
from vitlr.anatomy.linears import targets
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.files import save
from vitlr.planning.planner import plan
from vitlr.runtime.storage import fingerprint
from vitlr.surgery.application import apply

IMAGES, TOKENS = 16, 197
WANTED = 180.0  # seconds on two cores


def statistics(model: nn.Module) -> Statistics:
    """What calibration would hold of every linear for rounding, drawn once for a size."""
    linears, generator = targets(model), torch.Generator().manual_seed(0)
    sizes = {n for linear in linears.values() for n in linear.weight.shape}
    moments = {n: spd(n, generator) for n in sorted(sizes)}
    layers = {}
    for name, linear in linears.items():
        N, K = linear.weight.shape
        W, C, S = linear.weight.detach().double(), moments[K], moments[N]
        sums = {"moment": C, "gradient": W.mT @ S @ W, "output_gradient": S.clone()}
        if N <= K:
            sums = {"moment": W @ C @ W.mT, "gradient": S.clone(), "input_moment": C.clone()}
        zeros = torch.zeros(K, dtype=torch.float64)
        layers[name] = LayerStatistics(name, K, N, name, IMAGES * TOKENS, input_sum=zeros, **sums)
    weights = {name: linear.weight for name, linear in linears.items()}
    facts = {"images": IMAGES, "extras": ("rounding",), "input_shape": (3, 224, 224), "dtype": "float32"}
    return Statistics(layers, fingerprint(weights), ("loss",), **facts)


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--bits", type=int, default=4)
    args.add_argument("--depth", type=int, default=12, help="blocks; 12 is ViT-B")
    args.add_argument("--method", default="bits", choices=("bits", "mix"), help="mix: under a budget of as many bits")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = create_model("vit_base_patch16_224", depth=given.depth).eval()
    stats, results, marks = statistics(model), {}, [(time.perf_counter(), time.process_time())]

    def mark(stage: str) -> None:
        marks.append((time.perf_counter(), time.process_time()))
        wall, cpu = (now - before for now, before in zip(marks[-1], marks[-2], strict=True))
        results[stage] = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}
        print(f"{stage:<12} {wall:7.1f} s   {cpu:7.1f} CPU s", flush=True)

    budget = None if given.method == "bits" else f"bytes:{100 * given.bits / 32:.4g}%"
    bits = given.bits if given.method == "bits" else None
    chosen = plan(model, stats, budget, method=given.method, bits=bits)
    mark("plan")
    small = apply(model, chosen)
    mark("round")
    with tempfile.TemporaryDirectory() as folder:
        save(small, Path(folder) / "small.safetensors", plan=chosen)
        results["bytes"] = (Path(folder) / "small.safetensors").stat().st_size
    mark("save")
    wall = marks[-1][0] - marks[0][0]
    print(f"{len(chosen.levels)} layers, {results['bytes'] / 1e6:.1f} MB, predicted {chosen.error:.4g}, "
          f"{peak_bytes() / 2**30:.1f} GiB")  # fmt: skip
    results["whole"] = verdict("seconds / 180", wall / WANTED, 1.0, at_least=False) | {"wall_s": round(wall, 1)}
    finish("rounding", results, given.json)


if __name__ == "__main__":
    main()
