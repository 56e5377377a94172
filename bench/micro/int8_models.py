"""How much faster ViTs of bytes are: ours and OpenVINO's, against torch, interleaved in one process.

    pip install openvino nncf
    python -m bench.micro.int8_models [--cases vit_base_patch16_224:8 ...] [--threads N] [--cpu-time] [--json FILE]

Random weights and images: the time does not depend on them. OpenVINO's are the model in fp32 and bf16, and NNCF's
post-training quantisation for transformers with bf16 for the rest where the CPU has it, in latency mode. Ours run on x
in fp32 and in bf16. Without openvino and nncf only ours and torch are timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import finish, parser, verdict
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.engines.openvino_core import openvino_core
from vitlr.measuring.timing import compare
from vitlr.ops.backends import native
from vitlr.surgery.fusion import fuse

CASES = ["vit_base_patch16_224:8", "vit_base_patch16_224:1", "vit_tiny_patch16_224:50", "vit_tiny_patch16_224:1"]
WANTED = 1.0  # OpenVINO int8 over ours


def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--cases", nargs="+", default=CASES, help="timm model:batch size")
    args.add_argument("--repeats", type=int, default=15, help="rounds")
    args.add_argument("--cpu-time", action="store_true", help="time of the processor, for a machine that others use")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    results: dict[str, object] = {"isa": native.isa_used()}
    for case in given.cases:
        name, _, batch = case.partition(":")
        torch.manual_seed(0)
        model, images = create_model(name).eval(), torch.randn(int(batch), 3, 224, 224)
        functions = {**ours(model, images), **openvinos(model, images)}
        with torch.inference_mode():
            clock = time.process_time if given.cpu_time else time.perf_counter
            times = compare(functions, repeats=given.repeats, clock=clock)
        for key, t in times.items():
            print(f"  {case:<26} {key:<20} min {1e3 * t.min:8.1f} ms  {int(batch) / t.min:7.1f} images/s")
        results[case] = {key: round(1e3 * t.min, 3) for key, t in times.items()}
        best = min(times[key].min for key in times if key.startswith("bytes"))
        if "OpenVINO int8" in times:
            ratio = times["OpenVINO int8"].min / best
            results[f"{case} wanted"] = verdict(f"{case}: OpenVINO int8 / ours", ratio, WANTED, at_least=True)
    finish("int8 models", results, given.json)


def ours(model: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Torch as it is, in fp32 and bf16, and our kernels of floats and of bytes."""
    stats = calibrate(model, [images[:4]], objective="output", hidden=False, extras=("ranges",))
    small, plain = fuse(model, bits=8, stats=stats), fuse(model)
    functions: dict[str, Callable[[], Any]] = {}
    for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x = images.to(dtype)
        for key, kind in ((f"torch {word}", model), (f"fused {word}", plain), (f"bytes, {word}", small)):
            functions[key] = partial(copy.deepcopy(kind).to(dtype), x)
    return functions


def openvinos(model: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    """OpenVINO in fp32, bf16 and int8; nothing where it is not installed."""
    try:
        import nncf
        import openvino as ov
    except ImportError:
        return {}
    shape = [len(images), *images.shape[1:]]
    converted = ov.convert_model(copy.deepcopy(model), example_input=images, input=shape)
    data = nncf.Dataset([images.numpy()])
    small = nncf.quantize(copy.deepcopy(converted), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    functions: dict[str, Callable[[], Any]] = {}
    for key, graph, precision in (("fp32", converted, "f32"), ("bf16", converted, "bf16"), ("int8", small, "bf16")):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        compiled = openvino_core().compile_model(graph, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
        functions[f"OpenVINO {key}"] = partial(compiled, images.numpy())
    return functions


if __name__ == "__main__":
    main()
