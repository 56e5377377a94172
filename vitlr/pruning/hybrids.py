"""The hybrid of arXiv 2203.13444: low-rank attention, feed-forward blocks pruned at a lower rate, fine-tuned.

Like `vitlr.pipeline`, this joins stages: calibration, planning, surgery, pruning and training.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitlr.anatomy import linears, visibility
from vitlr.anatomy.attention import SUPPORTED, attention_names, attentions
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.planning import planner
from vitlr.planning.budgets import Budget, parse_budget
from vitlr.planning.plans import Plan
from vitlr.pruning.gated import Pruning, prune
from vitlr.pruning.options import Blending, Gating
from vitlr.pruning.thresholds import check_wanted
from vitlr.runtime.fields import keywords, names_of
from vitlr.runtime.progress import Progress, shows
from vitlr.surgery import application
from vitlr.training import TrainRecipe, TrainReport, TrainStep, train


@dataclass(frozen=True)
class Hybrid:
    """What the hybrid did: the ranks, then the pruning or, for low rank alone, the fine-tuning."""

    plan: Plan
    pruning: Pruning | None
    finetuning: TrainReport | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the plan without its factors."""
        pruning, finetuning = (None if part is None else part.to_dict() for part in (self.pruning, self.finetuning))
        return {"plan": self.plan.to_dict(), "pruning": pruning, "finetuning": finetuning}

    def __str__(self) -> str:
        tuned = [] if self.finetuning is None else [f"fine-tuning: {self.finetuning}"]
        return "\n".join([str(self.plan), *([] if self.pruning is None else [str(self.pruning)]), *tuned])


@shows("pruning", "updates")
@keywords(Blending)
def hybrid(
    model: nn.Module,
    loader: Iterable[Any],
    rate: float | None = None,
    *,
    budget: str | Budget | None = None,
    options: Blending | None = None,
    stats: Statistics | None = None,
    calibration: Iterable[Any] | None = None,
    recipe: TrainRecipe | None = None,
    finetune: TrainRecipe | bool = True,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: nn.Module | None = None,
    callbacks: Sequence[Callable[[TrainStep], None]] = (),
    validate: Callable[[nn.Module], float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> nn.Module:
    """Make attention low rank, prune feed-forward blocks by gates, fine-tune; `vitlr_hybrid` of the result says how.

    The linears of every attention keep a `share` of their weights, the same one each as published or, without
    `uniform`, as one knapsack allocates them. Then `vitlr.prune` with `kinds` (fc1, fc2): to a `rate` of
    the gates, or until the whole model meets the `budget` ("params:50%" of the model given). `kinds=None` prunes
    nothing: attention and feed-forward blocks alike become low rank under the budget, and are fine-tuned.

    `stats` are those of `vitlr.calibrate`; without, `calibration` (or the loader) is measured. All else as in `prune`.
    Raises `InputError` as that does, and where the attention is not known or the share leaves no rank.
    """
    total = cost.count_params(model)
    how = Blending.of(options, **changes)
    if how.kinds is None:
        if budget is None or rate is not None:
            raise InputError("low rank alone needs a budget, such as params:50%, and no rate")
        wanted, names = parse_budget(budget), []
    else:
        check_wanted(rate, budget)
        found = _attention(model)
        names, weights = list(found), sum(linear.weight.numel() for linear in found.values())
        wanted = Budget("params", math.floor(total - (1 - how.share) * weights), relative=False)
    measured = _measured(model, stats, loader if calibration is None else calibration, how.objective, resume)
    try:
        plan = planner.plan(
            model,
            measured,
            wanted,
            method="lowrank",
            uniform=how.uniform,
            rank_step=how.rank_step,
            include=_exactly(names) or None,
        )
    except InputError as cause:
        if how.kinds is None:
            raise
        raise InputError(f"attention cannot keep share={how.share:g} at rank_step={how.rank_step}: {cause}") from cause
    small = application.apply(model, plan)
    shared: dict[str, Any] = {
        "loss": loss,
        "reference": reference,
        "callbacks": callbacks,
        "validate": validate,
        "progress": progress,
    }
    pruning: Pruning | None = None
    tuned: TrainReport | None = None
    if how.kinds is not None:
        small = prune(
            small,
            loader,
            rate,
            budget=budget,
            of=total,
            options=Gating(**{key: getattr(how, key) for key in names_of(Gating)}),
            recipe=recipe,
            finetune=finetune,
            resume=resume,
            inplace=True,
            **shared,
        )
        pruning = small.vitlr_pruning  # type: ignore[assignment]
    elif finetune is not False:
        folder = None if resume is None else Path(resume) / "finetuning"
        tuned = train(small, loader, recipe if finetune is True else finetune, resume=folder, **shared)
    small.vitlr_hybrid = Hybrid(plan, pruning, tuned)  # type: ignore[assignment]
    return small.eval()


@visibility.seeing
def _attention(model: nn.Module) -> dict[str, nn.Linear]:
    """The attention linears that can be factorised; `InputError` with what is supported where there is none."""
    targets = linears.targets(model)
    found = {name: targets[name] for name in attention_names(model) if name in targets}
    if not found:
        reasons = [f"; {name}: {reason}" for name, reason in attentions(model)[1].items()]
        raise InputError(
            f"{type(model).__qualname__} has no attention to factorise{reasons[0] if reasons else ''}. "
            f"Supported: {SUPPORTED}"
        )
    return found


def _measured(
    model: nn.Module, stats: Statistics | None, loader: Iterable[Any], objective: str, folder: Any
) -> Statistics:
    """The statistics given, those of an interrupted run, or new ones."""
    if stats is not None:
        return stats
    path = None if folder is None else Path(folder) / "statistics.safetensors"
    if path is None or not path.exists():
        found = calibrate(model, loader, objective=objective, hidden=False)
        if path is None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return Statistics.load(path)  # also by the run that wrote them, so that both see the same bits


def _exactly(names: Sequence[str]) -> list[str]:
    return [rf"^{re.escape(name)}$" for name in names]
