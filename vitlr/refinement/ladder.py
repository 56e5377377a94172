"""The ladder: rung after rung, each kept only if held-out images agree."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.anatomy import visibility
from vitlr.anatomy.attention import fewer_heads
from vitlr.anatomy.mlps import narrower_mlps
from vitlr.data.batches import to_model
from vitlr.errors import InputError
from vitlr.measuring.cost import count_bytes, is_rounded
from vitlr.nn import FoldedScale, LowRankGLU, LowRankLinear, LowRankMLP, QuantizedLinear, SelectedLinear
from vitlr.refinement.blocks import free_layers, free_norms, lowrank_layers
from vitlr.refinement.distil import distil
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe, parse_rungs
from vitlr.refinement.refit import refit
from vitlr.refinement.regrow import regrow
from vitlr.refinement.report import Refinement, Rung, Snapshots
from vitlr.refinement.rescale import rescale
from vitlr.refinement.share import Share
from vitlr.runtime import processes
from vitlr.runtime.copies import duplicate
from vitlr.runtime.fields import keywords
from vitlr.runtime.modules import uncompiled
from vitlr.runtime.progress import Progress, Watch, alone, shown
from vitlr.runtime.snapshots import copied, restore, stored
from vitlr.runtime.storage import fingerprint
from vitlr.surgery.proof import prove

_UNITS = {"rescale": "images", "refit": "modules", "regrow": "layers", "distil": "steps"}
_NEW = (LowRankLinear, QuantizedLinear, SelectedLinear)  # what compression put in


@alone
@keywords(Recipe)
def refine(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    *,
    rungs: str | Sequence[str] = "distil",
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | bool | None = None,
    watch: Watch | None = None,
    recipe: Recipe | None = None,
    **changes: Any,
) -> nn.Module:
    """Bring a compressed model nearer to the dense `reference` on unlabelled images; a new model unless `inplace`.

    `rungs` "refit", "regrow" or "distil" runs all up to that one, "rescale" that alone, a sequence exactly those. How
    is said by a `recipe`, or by keywords of its names (steps, minutes, lr, batch_size, seed, ...); `steps` and
    `minutes` bound all rungs together, of which each may take an equal share of what is left. About 15 % of the images
    are held out and judge: a rung stays only if the KL divergence to the dense model falls there, so the model never
    comes back worse on them. Frozen parameters stay as they are. The same seed gives the same result, with any number
    of workers.
    `output_fn(answer)` picks what of a model's answer counts, as in `calibrate`.
    `resume` names a folder for snapshots, from which an interrupted run goes on to the same bits.
    `watch("refining, distil", total, unit)` is entered for every rung and gives its `progress(done, total)`.
    Several processes share the images of every batch and the modules that are solved one by one, and come to the same
    weights.
    The `Refinement` report is left in `model.vitlr_refinement` and, for the file, in `model.vitlr_info["recipe"]`.

    Raises `InputError` for fewer than 32 images, images all alike, unknown options, models without low-rank layers,
    fused, in half precision, frozen throughout or reached by no gradient, and snapshots of another run;
    `NumericalError` where the dense model's answers, or what is measured at a layer, are not finite.
    """
    model, reference = uncompiled(model), uncompiled(reference)
    recipe, wanted = Recipe.of(recipe, **changes), parse_rungs(rungs)
    wanted = _with_work(model, wanted)
    _check(model, reference, wanted)
    model = model if inplace else duplicate(model)
    if not wanted:
        return model
    proxy = Proxy(loader)
    changed = [name for name, module in model.named_modules() if isinstance(module, _NEW)]
    prove(model, changed, to_model(model, proxy.held[:1]))
    judge = Judge(reference, proxy.held, recipe.batch_size, output_fn)
    run = {
        "model": fingerprint(stored(model) if is_rounded(model) else dict(model.named_parameters())),
        "reference": fingerprint(dict(reference.named_parameters())),
        "images": [proxy.count + len(proxy.held), proxy.fingerprint],
        "rungs": list(wanted),
        "recipe": asdict(recipe),
    }
    processes.check_same("model", (run["model"], run["reference"]))
    with visibility.visible(reference):  # layers are known by the names that the compressed model has
        watch = watch or (lambda label, total, unit: shown(progress, label, total, unit))
        report = _climb(model, reference, proxy, judge, recipe, wanted, Snapshots(resume, run), watch)
    _attach(model, report)
    return model


def _climb(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    wanted: tuple[str, ...],
    snapshots: Snapshots,
    watch: Watch,
) -> Refinement:
    rungs: list[Rung] = []
    before = judge(model)
    most = count_bytes(model) if is_rounded(model) else None
    for place, name in enumerate(wanted):
        rung = snapshots.load_rung(name, model)
        if rung is None:
            saved, start, share = copied(model), time.monotonic(), Share.of(recipe, rungs, len(wanted) - place)
            images = proxy.count if name in ("rescale", "distil") else min(recipe.proxy_images, proxy.count)
            with watch(f"refining, {name}", None, _UNITS[name]) as told:
                given = (model, reference, proxy, judge)
                advance = told or (lambda done, total: None)
                if name == "rescale":
                    steps, note = rescale(*given, recipe, share, advance)
                elif name == "refit":
                    steps, note = refit(*given, recipe, share, advance)
                elif name == "regrow":
                    steps, note = regrow(*given, recipe, share, advance)
                else:
                    steps, note = distil(*given, share.bound(recipe), snapshots, advance)
            if name != "distil" and (frozen := len(lowrank_layers(model)) - len(free_layers(model))):
                note += f", {frozen} low-rank layers left frozen"
            after = judge(model)
            kept = after.kl < before.kl
            if most is not None and (taken := count_bytes(model)) > most:
                kept, note = False, f"{note}; {taken} bytes, {most} before".removeprefix("; ")
            if not kept:
                restore(model, saved)
            seconds = round(time.monotonic() - start, 3)
            rung = Rung(name, kept, before, after, images, steps, seconds, note)
            snapshots.save_rung(rung, model)
        if rung.kept:
            before = rung.after
        rungs.append(rung)
    return Refinement(proxy.count, len(proxy.held), recipe.seed, tuple(rungs))


def _with_work(model: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The rungs that find something to do: narrower and low-rank nowhere has no residual, integers are distilled."""
    if is_rounded(model):
        if wanted and "distil" not in wanted:
            raise InputError(f"{wanted[-1]} moves weights that this model holds as integers; take rungs='distil'")
        return tuple(rung for rung in wanted if rung == "distil")
    if lowrank_layers(model):
        return wanted
    useful = tuple(rung for rung in wanted if rung != "regrow")
    narrower = narrower_mlps(model) or any(isinstance(module, SelectedLinear) for module in model.modules())
    if not (narrower or fewer_heads(model)) or (wanted and not useful):
        raise InputError("the model has no low-rank layer, so there is no error to compensate; compress it first")
    return useful


def _check(model: nn.Module, reference: nn.Module, wanted: tuple[str, ...]) -> None:
    if any(isinstance(module, (FoldedScale, LowRankGLU, LowRankMLP)) for module in model.modules()):
        raise InputError("the model is fused; refine first and fuse afterwards, or take it back with vitlr.unfuse")
    if model is reference:
        raise InputError("model and reference are the same object; pass the dense model as reference")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"{name} is {parameter.dtype}; refine works in float32 and autocasts itself; cast afterwards"
            )
    if wanted:
        check_free(model)
        movable = [*free_layers(model), *(free_norms(model, reference) if "refit" in wanted else ())]
        if not {"rescale", "distil"} & {*wanted} and not movable:
            raise InputError("every low-rank layer has a frozen parameter; refit and regrow leave such layers alone")
    if torch.is_inference_mode_enabled():
        raise InputError("refine needs gradients and cannot run under torch.inference_mode(); call it outside")


def check_free(model: nn.Module) -> None:
    """`InputError` for a model that is frozen throughout."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("every parameter of the model is frozen; refinement needs some: model.requires_grad_(True)")


def _attach(model: nn.Module, report: Refinement) -> None:
    info = dict(getattr(model, "vitlr_info", None) or {})
    info["recipe"] = {**(info.get("recipe") or {}), "refinement": report.to_dict()}
    model.vitlr_info = info  # type: ignore[assignment]
    model.vitlr_refinement = report  # type: ignore[assignment]
