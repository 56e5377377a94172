"""Rounding for good: integers in the place of weights, and all else in what few bytes hold."""

from __future__ import annotations

import torch
from torch import nn

from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError
from vitlr.measuring.cost import rest
from vitlr.nn import LowRankLinear
from vitlr.ops.linalg.threads import in_threads
from vitlr.planning.plans import Plan
from vitlr.runtime import compact
from vitlr.runtime.modules import swap
from vitlr.runtime.progress import Progress


@torch.no_grad()
def round_weights(model: nn.Module, plan: Plan, spectra: Spectra, progress: Progress | None = None) -> None:
    """Put a `QuantizedLinear` where the plan says a level, and round what is left as it says, in place."""

    def rounded(name: str) -> nn.Module:
        linear = model.get_submodule(name)
        assert isinstance(linear, (nn.Linear, LowRankLinear))
        levels = spectra.levels[name]
        width = plan.narrowed.get(levels.narrowing.name) if levels.narrowing is not None else None
        low = levels.rounded(plan.levels[name], linear, width)
        return low.train(linear.training).requires_grad_(next(linear.parameters()).requires_grad)

    names, threads = list(plan.levels), torch.get_num_threads()
    for start in range(0, len(names), threads):
        some = names[start : start + threads]
        for name, low in zip(some, in_threads(rounded, some), strict=True):
            swap(model, name, low)
        if progress is not None:
            progress(min(start + threads, len(names)), len(names))
    if plan.rounds_rest:
        known = dict(model.named_parameters())
        if strange := [row.name for row in plan.others if row.name not in known]:
            raise InputError(f"the plan is of another model: no parameter {strange[0]!r}")
        bits = {id(known[row.name]): row.bits for row in plan.others}
        for tensor in rest(model, {layer.name for layer in plan.layers}):
            tensor.copy_(compact.rounded(tensor.detach(), bits.get(id(tensor), compact.BITS[0])))
