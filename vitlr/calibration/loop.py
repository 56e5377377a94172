"""Calibration: let images flow through the model once and add up what every linear layer sees and sends back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.anatomy.attention import measurable, nothing, score_attentions
from vitlr.anatomy.mlps import SUPPORTED, find_mlps, refused_mlps
from vitlr.calibration.hooks import Tap, sketches
from vitlr.calibration.probe import Probe, probe
from vitlr.calibration.statistics import (
    DEFAULT,
    EXTRAS,
    GRADIENT_OBJECTIVES,
    HIDDEN,
    OBJECTIVES,
    VALUES,
    LayerStatistics,
    Statistics,
    share_moments,
)
from vitlr.data.batches import call, count_images, image_shape, one_image, tensors, to_model
from vitlr.errors import InputError
from vitlr.measuring.losses import image_seeds, sampled_losses
from vitlr.runtime.contexts import evaluation_mode, frozen_parameters
from vitlr.runtime.progress import Progress
from vitlr.runtime.storage import fingerprint
from vitlr.runtime.words import some

HIDDEN_MEMORY = 8e9  # bytes: with "fisher" ViT-B's moments take 1.8e9, ViT-L's 6.4e9; half of that without


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    objective: str | Sequence[str] = DEFAULT,
    extras: Sequence[str] = (),
    hidden: bool | str = False,
    hidden_memory: float = HIDDEN_MEMORY,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    samples: int = 1,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
    stats: Statistics | None = None,
) -> Statistics:
    """Add up the moments of every compressible linear layer over the loader's images, in one pass.

    The loader yields tensors, tuples (the first item is used) or dicts (keyword arguments). `objective` names one or
    more of "fisher" (moments of activations and of the loss's gradients, see `measuring.losses`, the tokens of an image
    taken together), "loss" (the same, tokens taken as independent), "output" and "normalized" (arXiv 2402.06004);
    `extras` what the baselines need. `hidden` adds what pruning needs, the moment `Σ h hᵀ [D, D]` of every MLP's hidden
    neurons in float64: `8 D²` bytes an MLP, twice that with "fisher", refused where all would take more than
    `hidden_memory` bytes; `hidden="attention"` adds that of the heads side by side, `[d, d]` an attention, as well.
    `loss_fn(output, batch)` replaces the sampled loss by a scalar summed over the images, `output_fn(output)` picks the
    tensor to sample from; `samples` targets are drawn per image.
    `stats` continues an earlier run in place, `on_batch` sees the running statistics after every batch. The model comes
    back as it was.

    Raises `InputError` for an empty loader, layers that no image or no gradient reaches, images of several sizes and
    `torch.inference_mode`; `NumericalError` (naming the layer) for NaN or Inf. After an error in the middle of a batch
    the statistics passed as `stats` are marked as not whole, and refused.
    """
    if isinstance(loader, Tensor):
        raise InputError("the loader is one tensor; give batches, such as [images] or images.split(50)")
    objectives = (objective,) if isinstance(objective, str) else tuple(objective)
    _check_choice("objective", objectives, OBJECTIVES)
    extras = tuple(dict.fromkeys((*extras, *_hidden_extras(hidden))))
    _check_choice("extra", extras, EXTRAS)
    if samples < 1:
        raise InputError(f"samples={samples}, expected at least one draw per image")
    if loss_fn is not None and samples != 1:
        raise InputError(f"loss_fn= is one loss; it does not go with samples={samples}")
    if torch.is_inference_mode_enabled():
        raise InputError("calibrate needs gradients and cannot run under torch.inference_mode(); call it outside")
    by_gradient = set(objectives) & set(GRADIENT_OBJECTIVES)
    needs_gradient = bool(by_gradient) or "row_gradient" in extras

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(frozen_parameters(model))
        stack.enter_context(linears.visible(model))
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        targets = linears.targets(model, include=include, exclude=exclude)
        widths = _hidden_layers(model, targets, extras, "fisher" in objectives, hidden_memory)
        heads = score_attentions(model, targets).values() if HIDDEN in extras else ()
        queries = {attention.queries_keys[0]: (attention.heads, attention.head_dim) for attention in heads}
        run: Statistics | None = None
        taps: list[Tap] = []
        stack.callback(_remove, taps)
        for batch in loader:
            inputs = to_model(model, batch)
            images = count_images(inputs)
            if images == 0:
                continue
            if run is None:
                found = probe(model, targets, one_image(inputs))
                fresh = _empty(targets, found, image_shape(inputs))
                fresh.objectives, fresh.extras = objectives, extras
                fresh.samples, fresh.seed = samples, seed
                if stats is not None:
                    stats.check_addable(fresh)
                run = stats or fresh
                own = set(extras) - {HIDDEN, VALUES}
                pruned = {"input_moment", HIDDEN}
                collect = {name: {*objectives, *own, *(pruned if name in widths else ())} for name in targets}
                taps += [
                    Tap(run.layers[name], targets[name], collect[name], found.leading[name], queries.get(name))
                    for name in targets
                ]
            elif image_shape(inputs) != run.input_shape:
                raise InputError(
                    f"the loader gives images of {image_shape(inputs)} after images of {run.input_shape}; MACs and "
                    "tokens depend on the size, so calibrate with one"
                )
            run.whole = False
            for tap in taps:
                tap.forward(images)
            with torch.set_grad_enabled(needs_gradient):
                output = call(model, inputs)
                if needs_gradient:
                    seeds = image_seeds(tensors(inputs), seed)
                    if loss_fn is not None:
                        losses = [loss_fn(output, batch)]
                    else:
                        picked = output_fn(output) if output_fn is not None else output
                        losses = sampled_losses(model, picked, seeds, samples)
                    _backward(losses, taps, sketches(seeds, samples, taps))
            run.images += images
            run.whole = True
            if on_batch is not None:
                on_batch(run)
            if progress is not None:
                progress(run.images, _total(loader))
    if run is None:
        raise InputError("the loader gave no image; calibration needs at least one (a few hundred are better)")
    run.check_finite()
    if by_gradient and not any(layer.sum("gradient").any() for layer in run.layers.values()):
        raise InputError(
            "no gradient reached any layer: the model's answer does not depend on them (is its head still all zeros?); "
            "load trained weights, or calibrate with objective='output'"
        )
    return _to_cpu(run)


def _backward(losses: Sequence[Tensor], taps: Sequence[Tap], sketched: Sequence[Tensor | None]) -> None:
    """Backward passes of all losses; `InputError` naming the layers that no gradient arrives at."""
    for index, loss in enumerate(losses):
        for tap in taps:
            tap.backward(sketched[index])
        if not loss.requires_grad:
            raise InputError("the model's answer does not depend on its layers through autograd (no_grad or detach?)")
        loss.backward(retain_graph=index + 1 < len(losses))
    cut_off = [tap.stats.name for tap in taps if not tap.gradient_seen]
    if cut_off:
        raise InputError(
            f"no gradient arrives at {len(cut_off)} layers ({some(cut_off)}): "
            "they are cut off by no_grad or detach, so nothing could be said of them; leave them out with exclude=, or "
            "calibrate with objective='output'"
        )


def _empty(targets: Mapping[str, nn.Linear], found: Probe, shape: Any) -> Statistics:
    layers = {
        name: LayerStatistics(name, linear.in_features, linear.out_features, found.owners[name])
        for name, linear in targets.items()
    }
    weights = fingerprint({name: linear.weight for name, linear in targets.items()})
    return Statistics(layers, weights, macs=found.macs, input_shape=shape)


def _hidden_extras(hidden: bool | str) -> tuple[str, ...]:
    """The extras that `hidden=` stands for."""
    if hidden not in (False, True, "attention"):
        raise InputError(f"hidden={hidden!r}, expected True for MLPs or 'attention' for attention too")
    return (HIDDEN, VALUES) if hidden == "attention" else (HIDDEN,) if hidden else ()


def _hidden_layers(
    model: nn.Module, targets: Mapping[str, nn.Linear], extras: Sequence[str], by_image: bool, limit: float
) -> frozenset[str]:
    """The linears whose whole input moment pruning needs; `InputError` where there are none or they take too much."""
    widths: dict[str, int] = {}
    if HIDDEN in extras:
        mlps = find_mlps(model).values()
        widths = {mlp.linears[-1]: mlp.width for mlp in mlps if set(mlp.linears) <= set(targets)}
        if not widths and VALUES not in extras:
            reasons = [f"{name}: {reason}" for name, reason in refused_mlps(model).items()]
            why = reasons[0] if reasons else f"none is of a form that is known ({SUPPORTED})"
            raise InputError(f"hidden=True finds no MLP whose width could change among the measured layers; {why}")
    what = [f"{len(widths)} MLPs"] if widths else []
    if VALUES in extras:
        found, refused = measurable(model, targets)
        if not found:
            raise InputError(nothing(model, refused))
        widths |= {attention.output: attention.width for attention in found.values()}
        what.append(f"{len(found)} attentions")
    taken = sum(8 * width**2 for width in widths.values()) * (2 if by_image else 1)
    if taken > limit:
        raise InputError(
            f"the hidden moments of {' and '.join(what)} take {taken:,} bytes, more than hidden_memory={limit:,.0f}; "
            "raise it, or measure fewer of them (include=, exclude=)"
        )
    return frozenset(widths)


def _remove(taps: list[Tap]) -> None:
    for tap in taps:
        tap.remove()


def _check_choice(what: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown or (what == "objective" and not chosen):
        raise InputError(f"unknown {what} {unknown[0] if unknown else '()'!r}, expected one of {', '.join(known)}")


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _total(loader: Any) -> int | None:
    """How many images the loader will give, where it says so."""
    try:
        return int(loader.images) if hasattr(loader, "images") else len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _to_cpu(stats: Statistics) -> Statistics:
    for layer in stats.layers.values():
        layer.held = {key: tensor.cpu() for key, tensor in layer.sums()}
    share_moments(stats.layers)
    return stats
