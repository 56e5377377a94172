"""Is a model calibrated and planned on the card as it is on the CPU, and how fast?

Two images go through both, and every sum of calibration is compared; then more are timed on the card, ranks are planned
from them there, and the smaller model runs. Weights are random: they change neither sums' agreement nor times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.gate.models import MODEL
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

OFF = 0.02
"""How far a sum may be from the CPU's, relatively: TF32 in the patch embedding, and other orders of summation."""
BUDGET = "params:60%"


def run(
    device: torch.device,
    begin: Callable[[str], None],
    images: int = 64,
    batch: int = 16,
    make: Callable[[], nn.Module] = lambda: create_model(MODEL),
) -> dict[str, Any]:
    """{off, sum, images_per_s, peak_mb, plan_s, ranks}: the sum that is furthest off, and what is timed on the card."""
    begin("models")
    torch.manual_seed(0)
    model = make().eval()
    size = (3, *model.patch_embed.img_size)  # type: ignore[union-attr,misc]
    seen = torch.randn(images, *size, generator=torch.Generator().manual_seed(1))
    begin("calibration on the CPU")
    expected = calibrate(model, [seen[:2]])
    begin("calibration on the card")
    moved = copy.deepcopy(model).to(device)
    found = calibrate(moved, [seen[:2]])
    off, which = max(
        (float((found.layers[name].sum(key) - there).norm() / there.norm().clamp_min(1e-300)), f"{name} {key}")
        for name, layer in expected.layers.items()
        for key, there in layer.sums()
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    stats = calibrate(moved, seen.split(batch))
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    begin("plan")
    start = time.perf_counter()
    chosen = plan(moved, stats, BUDGET, method="lowrank")
    planning = time.perf_counter() - start
    begin("the smaller model")
    with torch.inference_mode():
        answer = apply(moved, chosen)(seen[:2].to(device))
    if not bool(torch.isfinite(answer).all()):
        off, which = float("inf"), "logits of the smaller model"
    times = {"images_per_s": images / seconds, "peak_mb": peak, "plan_s": planning}
    return {"off": off, "sum": which, **times, "ranks": len(chosen.ranks)}
