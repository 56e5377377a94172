"""What of the kernels arrives in a whole ViT-B?

Dense, compressed as plain products, and fused with kernels, in bf16, as a CUDA graph or compiled as one: images a
second and peak memory beyond the weights. Weights are random: they do not change the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.cases.clock import microseconds
from vitlr.anatomy import linears
from vitlr.anatomy.mlps import find_mlps
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.structure import restructure
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear
from vitlr.surgery.fusion import fuse

MODEL = "vit_base_patch16_224"
OFF = {"fused": 0.1, "fp8": 0.4}
"""How far outputs may be from those of plain products, relatively: bf16 in 48 layers, 8-bit floats in as many."""
NAMES = ("dense", "products", "fused", "fp8", "dense fp8")


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
    return _filled(restructure(copy.deepcopy(dense), layers))


def joint(dense: nn.Module, share: float, rank: float = 0.3, least: float = 0.25) -> nn.Module:
    """A copy in the form of a joint plan: MLPs as narrow as `share` of the parameters asks, three qkv low-rank.

    Where that would leave less than `least` of the MLPs, more linears of attention are low-rank. Which channels and
    layers go is decided by nothing: the time depends on shapes alone.
    """
    mlps, layers = list(find_mlps(dense).values()), {}
    inside = [name for name in linears.targets(dense) if name.endswith(("qkv", "proj"))]
    three = [name for name in inside if name.endswith("qkv")]
    three = three[:: max(1, len(three) // 3)][:3]
    over = count_params(dense) * (1 - share)  # what has to go
    for name in [*three, *(name for name in inside if name not in three)]:
        width = 1 - over / sum(sum(p.numel() for p in mlp.module.parameters()) for mlp in mlps)
        if name not in three and width >= least:
            break
        linear = dense.get_submodule(name)
        N, K = linear.out_features, linear.in_features
        r = max(8, int(rank * K) // 8 * 8)
        layers[name] = {"rank": r, "in_features": K, "out_features": N, "bias": linear.bias is not None}
        over -= N * K - r * (N + K)
    width = 1 - over / sum(sum(p.numel() for p in mlp.module.parameters()) for mlp in mlps)
    layers |= {mlp.name: {"width": max(16, int(mlp.width * width) // 16 * 16)} for mlp in mlps}
    return _filled(restructure(copy.deepcopy(dense), layers))


def fixed_rank(dense: nn.Module, rank: int) -> nn.Module:
    """A copy with random factors of one rank in every layer that has so many."""
    layers = {}
    for name, linear in linears.targets(dense).items():
        N, K = linear.out_features, linear.in_features
        if rank < N * K / (N + K):
            bias = linear.bias is not None
            layers[name] = {"rank": rank, "in_features": K, "out_features": N, "bias": bias}
    return _filled(restructure(copy.deepcopy(dense), layers))


def _filled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.reset_parameters()
    return model


def planned(dense: nn.Module, plan: str) -> nn.Module:
    """A compressed copy by the plan's name: `ranks R`, `params:P%` or `joint params:P%`."""
    if plan.startswith("ranks "):
        return fixed_rank(dense, int(plan.removeprefix("ranks ")))
    share = float(plan.rpartition(":")[2].removesuffix("%")) / 100
    return joint(dense, share) if plan.startswith("joint") else low_rank(dense, share)


@torch.inference_mode()
def run(
    kept: dict[str, Any],
    device: torch.device,
    begin: Callable[[str], None],
    plan: str,
    batch: int,
    mode: str = "graph",
    names: tuple[str, ...] = NAMES,
    make: Callable[[], nn.Module] = lambda: create_model(MODEL),
) -> list[dict[str, Any]]:
    """Rows {plan, batch, model, mode, images_per_s, peak_mb, off} of the dense model and of the compressed one.

    `off`: ‖fused − products‖ / ‖products‖ of the outputs, and of "fp8" likewise, where kernels run at shapes that
    nobody checked.
    `kept` holds the models of the last plan from one call to the next.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begin("models")
    if "dense" not in kept:
        torch.manual_seed(0)
        kept["made"] = make().eval()
        kept["dense"] = copy.deepcopy(kept["made"]).to(device, dtype)
        kept["dense fp8"] = fuse(kept["dense"], bits="fp8")
    if kept.get("plan") != plan:
        small = planned(kept["made"], plan).eval()
        pair = {"products": two_gemms(small), "fused": fuse(small)}
        kept |= {"plan": plan, **{name: model.to(device, dtype) for name, model in pair.items()}}
        kept["fp8"] = fuse(small.to(device, dtype), bits="fp8")
    models = {name: kept[name] for name in names}
    size = (3, *kept["made"].patch_embed.img_size)
    x = torch.randn(batch, *size, device=device, dtype=dtype)
    functions, outputs = {}, {}
    for name, model in models.items():
        begin(f"{name}, {mode}")
        functions[name] = _in_mode(model, mode, x)
        outputs[name] = functions[name](x).double()
    if mode != "graph":
        outputs["products"] = kept["products"](x).double()
    plain = outputs["products"]
    off = {name: float((outputs[name] - plain).norm() / plain.norm()) for name in OFF if name in outputs}
    begin("turns")
    us = microseconds(functions, [(x,)], device, rounds=10, graphs=mode != "eager")
    return [
        {
            "plan": plan,
            "batch": batch,
            "model": name,
            "mode": mode,
            "images_per_s": round(1e6 * batch / value, 1),
            "peak_mb": _peak(functions[name], x, device),
            "off": off.get(name),
        }
        for name, value in us.items()
    ]


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
        backend = "inductor" if x.device.type == "cuda" else "eager"  # rehearsed, it need only be traced
        function = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
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
