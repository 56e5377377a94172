"""Vision Transformer Pruning, the whole recipe: train gates with `λ ‖a‖₁`, threshold, remove, fine-tune.

Source: arXiv 2104.08500. Like `vitlr.pipeline`, this joins stages: gates, removal and training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitlr.data.batches import one_image, to_model
from vitlr.data.loader import Loader
from vitlr.errors import NumericalError
from vitlr.planning.budgets import Budget
from vitlr.pruning.channels import remove_channels
from vitlr.pruning.gates import GatedLinear, add_gates, gates, penalty, remove_gates
from vitlr.pruning.options import Gating
from vitlr.pruning.thresholds import Cut, check_wanted, choose
from vitlr.runtime.copies import duplicate
from vitlr.runtime.fields import keywords
from vitlr.runtime.progress import Progress, shows
from vitlr.runtime.snapshots import Snapshots
from vitlr.runtime.storage import fingerprint
from vitlr.surgery.fusion import unfuse
from vitlr.surgery.proof import prove
from vitlr.training import TrainRecipe, TrainReport, TrainStep, train


@dataclass(frozen=True)
class Pruning:
    """What pruning did: the training of the gates, the cut, and the fine-tuning (None where there was none)."""

    l1: float
    gates: TrainReport
    cut: Cut
    finetuning: TrainReport | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a phase stopped early, if one did."""
        reports = (("gates", self.gates), ("fine-tuning", self.finetuning))
        return tuple(f"{phase}: {report.note}" for phase, report in reports if report is not None and report.note)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        finetuning = None if self.finetuning is None else self.finetuning.to_dict()
        return {"l1": self.l1, "gates": self.gates.to_dict(), "cut": self.cut.to_dict(), "finetuning": finetuning}

    def __str__(self) -> str:
        lines = [f"gates, l1 {self.l1:g}: {self.gates}", str(self.cut)]
        return "\n".join([*lines, *([f"fine-tuning: {self.finetuning}"] if self.finetuning is not None else [])])


@shows("pruning", "updates")
@keywords(Gating)
def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rate: float | None = None,
    *,
    budget: str | Budget | None = None,
    options: Gating | None = None,
    recipe: TrainRecipe | None = None,
    finetune: TrainRecipe | bool = True,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: nn.Module | None = None,
    callbacks: Sequence[Callable[[TrainStep], None]] = (),
    validate: Callable[[nn.Module], float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    of: int | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> nn.Module:
    """Prune a model by learnt gates, with labels; a new model whose `vitlr_pruning` says what was done.

    Gates of 1 go before qkv, the attention's projection, fc1 and fc2 (`kinds`); everything is trained on
    `loss + l1 ‖a‖₁` as `recipe` says; the least important gates go until a share `rate` of them has gone, or until the
    budget of what is KEPT ("params:60%") is met (`vitlr.pruning.thresholds.choose` has thresholds, tile, floor); rows
    and columns are removed; what is left is fine-tuned without that term as `finetune` says (True: like the gates).
    All about the gates is said by `options`, or by keywords of its names.
    With `fold` the kept gates are multiplied into the weights, so that removal changes nothing but what it removes;
    without, they become 1, as published. Frozen weights are not trained: all that may happen to them is removal, and
    that factor.

    `loader`, `loss`, `reference` (a dense model to distil from), `callbacks`, `validate` are those of
    `vitlr.training.train` in both phases. The gates are those of the last epoch; `validate` chooses among epochs of the
    fine-tuning. `resume` names a folder from which an interrupted run goes on to the same bits, in whichever phase.

    A loss that is no number ends its phase with the best weights so far, and a note in the report; where that leaves
    untrained gates, `NumericalError`. Raises `InputError` for rates outside (0, 1), models whose attention or MLPs are
    not known (named), budgets out of reach, and what the training refuses.
    """
    check_wanted(rate, budget)
    gating = Gating.of(options, **changes)
    how: dict[str, Any] = {key: getattr(gating, key) for key in ("thresholds", "tile", "floor")} | {"of": of}
    recipe = TrainRecipe() if recipe is None else recipe
    second = recipe if finetune is True else finetune or None
    if reference is model and inplace:
        reference = duplicate(model)  # it answers as it was
    shared: dict[str, Any] = {"loss": loss, "reference": reference, "callbacks": callbacks}
    model = unfuse(model, inplace=inplace)
    folder = _Folder(resume, model, gating)

    gated = add_gates(model, gating.gated, inplace=True)
    choose(gated, rate, budget=budget, **how)  # in reach, whoever goes?
    _prove(gated, loader)
    trained = train(
        gated,
        loader,
        replace(recipe, keep="last"),  # an earlier epoch's gates would be nearer to where they started
        penalty=lambda m: gating.l1 * penalty(m),
        resume=folder.phase("gates"),
        progress=_part(progress, 0, recipe, second),
        **shared,
    )
    if trained.kept == 0:
        raise NumericalError(f"the gates are untrained: {trained.note}; lower the learning rate")
    cut = choose(gated, rate, budget=budget, **how)
    small = cut_off(gated, cut, fold=gating.fold)
    tuned = None
    if second is not None:
        tuned = train(
            small,
            loader,
            second,
            validate=validate,
            resume=folder.phase(f"finetuning-{fingerprint(cut.keep)[:8]}"),  # one training of gates serves many cuts
            progress=_part(progress, 1, recipe, second),
            **shared,
        )
    small.vitlr_pruning = Pruning(gating.l1, trained, cut, tuned)  # type: ignore[assignment]
    return small.eval()


def _prove(gated: nn.Module, loader: Iterable[Any]) -> None:
    """Every gate is called and counts, on one image; not where that would use the loader up."""
    if isinstance(loader, Iterator):
        return
    first = next(iter(loader.subset([0]) if isinstance(loader, Loader) else loader), None)
    if first is not None:
        names = [name for name, module in gated.named_modules() if isinstance(module, GatedLinear)]
        prove(gated, names, one_image(to_model(gated, first)))


def cut_off(gated: nn.Module, cut: Cut, *, fold: bool = True) -> nn.Module:
    """Take the gates off a gated model and remove the channels that the cut does not keep, in place."""
    found = {name: gate.site for name, gate in gates(gated).items()}
    return remove_channels(remove_gates(gated, fold=fold, inplace=True), found, cut.keep, inplace=True)


class _Folder:
    """Where the phases of a run keep their snapshots; None keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None, model: nn.Module, gating: Gating) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            run = {"model": fingerprint(dict(model.named_parameters())), "gates": list(gating.gated), "l1": gating.l1}
            kept = Snapshots(self.folder, run)
            if kept.load("pruning") is None:
                kept.save("pruning", {}, {})

    def phase(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def _part(progress: Progress | None, phase: int, first: TrainRecipe, second: TrainRecipe | None) -> Progress | None:
    """One of the two phases as part of the whole, in updates."""
    if progress is None:
        return None
    lengths = [0.0 if recipe is None else recipe.epochs / recipe.grad_accum_steps for recipe in (first, second)]

    def report(done: int, total: int | None) -> None:
        whole = None if total is None else round(total * sum(lengths) / lengths[phase])
        before = 0 if whole is None else round(whole * sum(lengths[:phase]) / sum(lengths))
        assert progress is not None
        progress(before + done, whole)

    return report
