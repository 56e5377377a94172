"""The gate's third question: what of it arrives in a whole ViT-B?

Dense, low rank as two GEMMs, and fused with kernels, in bf16: eager, as a CUDA graph, and compiled as a CUDA graph;
images a second and peak memory beyond the weights. Ranks are uniform and weights random: neither changes the time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.cases.clock import microseconds
from bench.gate.choice import trusting
from vitlr.anatomy import linears
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.structure import restructure
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear
from vitlr.surgery.fusion import fuse

MODEL = "vit_base_patch16_224"


def low_rank(dense: nn.Module, share: float, step: int = 16) -> nn.Module:
    """A copy with random factors of uniform relative rank, of at most `share` of the parameters."""
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.targets(dense).items()}
    fixed = count_params(dense) - sum(N * K for N, K in shapes.values())
    part = (share * count_params(dense) - fixed) / sum(N * K for N, K in shapes.values())
    layers = {}
    for name, (N, K) in shapes.items():
        rank = max(step, int(part * N * K / (N + K)) // step * step)
        bias = dense.get_submodule(name).bias is not None
        layers[name] = {"rank": rank, "in_features": K, "out_features": N, "bias": bias}
    model = restructure(copy.deepcopy(dense), layers)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.reset_parameters()
    return model


@torch.inference_mode()
def run(
    device: torch.device,
    rows: list[dict[str, Any]],
    seconds: float,
    *,
    batches: tuple[int, ...] = (64, 256, 1),
    shares: tuple[float, ...] = (0.4, 0.6),
    make: Callable[[], nn.Module] = lambda: create_model(MODEL),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows {budget, batch, model, mode, images_per_s, peak_mb} and what there was no time for."""
    end = time.monotonic() + seconds
    found, left = [], []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    dense = make()
    size = dense.default_cfg["input_size"] if not hasattr(dense, "patch_embed") else (3, *dense.patch_embed.img_size)
    with trusting(device, rows):
        for share in shares:
            small = low_rank(dense, share)
            models = {"two GEMMs": two_gemms(small), "fused": fuse(small)}
            if share == shares[0]:
                models = {"dense": dense, **models}
            models = {name: copy.deepcopy(model).to(device, dtype).eval() for name, model in models.items()}
            for batch in batches:
                x = torch.randn(batch, *size, device=device, dtype=dtype)
                for mode in ("eager", "graph", "compiled"):
                    label = f"params:{share:.0%} batch {batch} {mode}"
                    if time.monotonic() > end:
                        left.append(label)
                        continue
                    functions = {name: _in_mode(model, mode, x) for name, model in models.items()}
                    us = microseconds(functions, [(x,)], device, rounds=10, graphs=mode != "eager")
                    for name, value in us.items():
                        found.append(
                            {
                                "budget": f"{share:.0%}" if name != "dense" else "100%",
                                "batch": batch,
                                "model": name,
                                "mode": mode,
                                "images_per_s": round(1e6 * batch / value, 1),
                                "peak_mb": _peak(functions[name], x, device),
                            }
                        )
                    torch.compiler.reset()
    return found, left


def two_gemms(model: nn.Module) -> nn.Module:
    """A copy whose low-rank layers are two plain linears, which no dispatch ever sees."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LowRankLinear):
                setattr(parent, name, nn.Sequential(child.down, child.up))
    return model


def _in_mode(model: nn.Module, mode: str, x: torch.Tensor) -> Callable[..., Any]:
    function: Callable[..., Any] = model
    if mode == "compiled":
        function = torch.compile(model, fullgraph=True, dynamic=False)
    function(x)
    return function


def _peak(function: Callable[..., Any], x: torch.Tensor, device: torch.device) -> float | None:
    """MB that one call needs at most, beyond what is held before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(x)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with throughput as a multiple of the dense model's in the same mode."""
    dense = {(r["batch"], r["mode"]): r["images_per_s"] for r in rows if r["model"] == "dense"}
    lines = ["| kept | batch | mode | model | images/s | of dense | peak MB |", "|---" * 7 + "|"]
    for r in rows:
        base = dense.get((r["batch"], r["mode"]))
        ratio = f"{r['images_per_s'] / base:.2f}x" if base else ""
        peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        cells = (r["budget"], r["batch"], r["mode"], r["model"], f"{r['images_per_s']:.0f}", ratio, peak)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
