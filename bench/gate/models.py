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
OFF = 0.1
"""How far the outputs of the fused model may be from those of plain products, relatively: bf16 in 48 layers."""


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


def joint(dense: nn.Module, width: float = 0.625, rank: float = 0.3) -> nn.Module:
    """A copy in the form of a joint plan: every MLP narrowed, three linears of 48 low-rank, as such plans of ViT-B are.

    Which channels and layers go is decided by nothing: the time depends on shapes alone.
    """
    layers: dict[str, dict[str, Any]] = {}
    for mlp in find_mlps(dense).values():
        layers[mlp.name] = {"width": int(mlp.width * width) // 16 * 16}
    names = [name for name in linears.targets(dense) if name.endswith("qkv")]
    for name in names[:: max(1, len(names) // 3)][:3]:
        linear = dense.get_submodule(name)
        N, K = linear.out_features, linear.in_features
        layers[name] = {"rank": max(8, int(rank * K) // 8 * 8), "in_features": K, "out_features": N}
        layers[name]["bias"] = linear.bias is not None
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
    """A compressed copy by the plan's name: `joint`, `ranks R` or `params:P%`."""
    if plan == "joint":
        return joint(dense)
    if plan.startswith("ranks "):
        return fixed_rank(dense, int(plan.removeprefix("ranks ")))
    return low_rank(dense, float(plan.removeprefix("params:").removesuffix("%")) / 100)


@torch.inference_mode()
def run(
    kept: dict[str, Any],
    device: torch.device,
    begin: Callable[[str], None],
    plan: str,
    batch: int,
    mode: str = "graph",
    names: tuple[str, ...] = ("dense", "products", "fused"),
    make: Callable[[], nn.Module] = lambda: create_model(MODEL),
) -> list[dict[str, Any]]:
    """Rows {plan, batch, model, mode, images_per_s, peak_mb, off} of the dense model and of the compressed one.

    `off`: ‖fused − products‖ / ‖products‖ of the outputs, where kernels run at shapes that nobody checked.
    `kept` holds the models of the last plan from one call to the next.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begin("models")
    if "dense" not in kept:
        torch.manual_seed(0)
        kept["made"] = make().eval()
        kept["dense"] = copy.deepcopy(kept["made"]).to(device, dtype)
    if kept.get("plan") != plan:
        small = planned(kept["made"], plan).eval()
        pair = {"products": two_gemms(small), "fused": fuse(small)}
        kept |= {"plan": plan, **{name: model.to(device, dtype) for name, model in pair.items()}}
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
    off = float((outputs["fused"] - outputs["products"]).norm() / outputs["products"].norm())
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
            "off": off if name == "fused" else None,
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
