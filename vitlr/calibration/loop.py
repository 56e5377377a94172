"""Calibration: let images flow through the model once and add up what every linear layer sees and sends back."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.anatomy import linears, visibility
from vitlr.anatomy.attention import score_attentions
from vitlr.calibration.hidden import hidden_layers
from vitlr.calibration.hooks import Tap, sketches
from vitlr.calibration.options import FEW, GRADIENT_OBJECTIVES, HIDDEN, QUERIES, RANGES, ROUNDING, Calibration
from vitlr.calibration.others import Others
from vitlr.calibration.probe import Probe, check_model, embedding, probe, scalar, strided_layers, unreached
from vitlr.calibration.resuming import images_of, resumed
from vitlr.calibration.shares import NOTHING, Share, begin_anew, everywhere, example, together
from vitlr.calibration.statistics import Statistics
from vitlr.calibration.sums import LayerStatistics, share_moments, triangles
from vitlr.calibration.wants import Wants
from vitlr.data.batches import (
    call,
    count_images,
    first_images,
    for_model,
    image_dtype,
    image_shape,
    on_device,
    one_image,
    tensors,
    tensors_in,
)
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.losses import certain, image_seeds, largest_doubt, sampled_losses, what_is
from vitlr.runtime import processes
from vitlr.runtime.contexts import evaluation_mode, frozen_parameters
from vitlr.runtime.copies import no_graphs_left
from vitlr.runtime.fields import keywords
from vitlr.runtime.mapped import Mapped
from vitlr.runtime.modules import uncompiled
from vitlr.runtime.progress import Progress, shows
from vitlr.runtime.storage import fingerprint
from vitlr.runtime.words import some

_DOUBT = 1e-4  # of a model's least certain answer, below which gradients say nothing of large changes
_logger = logging.getLogger(__name__)


@shows("calibrating")
@keywords(Calibration)
def calibrate(
    model: nn.Module,
    loader: Iterable[Any] | None,
    *,
    options: Calibration | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    progress: Progress | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
    stats: Statistics | None = None,
    resume: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Statistics:
    """Add up the moments of every compressible linear layer over the loader's images, in one pass.

    The loader yields tensors, tuples (the first item is used) or dicts (keyword arguments). What is measured are
    `options`, or keywords of the same names. `objective` names one or
    more of "fisher" (moments of activations and of the loss's gradients, see `measuring.losses`, the tokens of an image
    taken together), "loss" (the same, tokens taken as independent), "output" and "normalized" (arXiv 2402.06004);
    `extras` what the baselines need. `hidden` adds what narrower MLPs need, the moment `Σ h hᵀ [D, D]` of every MLP's
    hidden neurons in float64: `8 D²` bytes an MLP, twice that with "fisher". By itself (None) it does so where MLPs are
    recognised and all fits into `hidden_memory` bytes, else `notes["no_hidden"]` says why not; True refuses what cannot
    be had; "attention" adds that of the heads side by side, `[d, d]` an attention, as well. Where no MLP can get
    narrower the moments of queries and keys are measured alone (the extra "queries").
    `loss_fn(output, batch)` replaces the sampled loss by a scalar summed over the images, `output_fn(output)` picks the
    tensor to sample from; `samples` losses are drawn per image.
    `stats` continues an earlier run in place, `on_batch` sees the running statistics after every batch. `resume` names
    a file: used if it is there and fits, written otherwise, saved on the way and gone on from after an interrupt. The
    model comes back as it was.

    Raises `InputError` for an empty loader, layers that no image or no gradient reaches, images of several sizes,
    `torch.inference_mode` and a file of another run; `NumericalError` (naming the layer) for NaN or Inf. After an error
    in the middle of a batch the statistics passed as `stats` are marked as not whole, and refused.
    """
    model, wanted = uncompiled(model), Calibration.of(options, **changes)
    if isinstance(loader, Tensor):
        raise InputError("the loader is one tensor; give batches, such as [images] or images.split(50)")
    if loss_fn is not None and wanted.samples != 1:
        raise InputError(f"loss_fn= is one loss; it does not go with samples={wanted.samples}")
    if torch.is_inference_mode_enabled():
        raise InputError("calibrate needs gradients and cannot run under torch.inference_mode(); call it outside")
    if resume is not None:
        if stats is not None:
            raise InputError("stats= goes on from statistics, resume= from a file of them; give one")
        again = functools.partial(calibrate, model, loss_fn=loss_fn, output_fn=output_fn)
        return resumed(again, model, loader, resume, wanted, tuple(changes), progress, on_batch)
    if loader is None:
        raise InputError("loader= is missing: calibration needs images")
    check_model(model)
    objectives = wanted.objectives
    by_gradient = set(objectives) & set(GRADIENT_OBJECTIVES)

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_graphs_left(model))
        stack.enter_context(frozen_parameters(model))
        stack.enter_context(visibility.visible(model))
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        check_finite(model)
        # Layers are run in bytes as they are in the end, and so are the factors of those that have low rank by then.
        factors = RANGES in wanted.extras
        targets = linears.targets(model, include=wanted.include, exclude=wanted.exclude, factors=factors)
        lost = set() if stats is None else set(stats.notes.get("unreached", ()))  # layers that the answer passes by
        targets = {name: linear for name, linear in targets.items() if name not in lost}
        extras, widths, why_not = hidden_layers(model, targets, wanted, stats)
        needs_gradient = bool(by_gradient) or "row_gradient" in extras
        run: Statistics | None = None
        doubts: list[Tensor] = []  # read at the end: the device is not waited for
        taps: list[Tap] = []
        others: Others | None = None
        ordered = False  # it is known how the rows of images lie in a batch
        stack.callback(_remove, taps)
        share = Share.of(loader)
        for batch in share:
            given = None if batch is NOTHING else for_model(model, batch)
            inputs = None if given is None else on_device(model, given)
            images = 0 if inputs is None else count_images(inputs)
            if run is None:
                one = example(model, inputs if images else None)
                if one is None:
                    continue
                found = probe(model, targets, one)
                if loss_fn is None:
                    lost |= unreached(model, targets, one, output_fn, needs_gradient)
                lost |= found.silent | embedding(model, targets, one)
                if lost:
                    targets = {name: linear for name, linear in targets.items() if name not in lost}
                    found = probe(model, targets, one)
                    extras, widths, why_not = hidden_layers(model, targets, wanted, stats)
                fresh = _empty(targets, found, image_shape(one))
                processes.check_same("model", fresh.fingerprint)
                fresh.objectives, fresh.extras = objectives, extras
                fresh.samples, fresh.seed = wanted.samples, wanted.seed
                fresh.dtype = image_dtype(one)
                if lost:
                    fresh.notes["unreached"] = sorted(lost)
                if why_not:
                    fresh.notes["no_hidden"] = why_not
                if stats is not None:
                    stats.check_addable(fresh)
                    if not processes.first():  # what there was is the first one's
                        begin_anew(stats)
                run = stats or fresh
                heads = score_attentions(model, targets).values() if {HIDDEN, QUERIES} & set(extras) else ()
                queries = {attention.queries_keys[0]: (attention.heads, attention.head_dim) for attention in heads}
                behind = {a.queries_keys[0]: model.get_parameter(a.bias) for a in heads if a.bias}
                file = _file(wanted.sums_in, _device(targets))
                wants = Wants(run.layers, queries, _device(targets), objectives, extras, frozenset(widths), bool(file))
                wants.check_fits(wanted.most)
                taps += [
                    Tap(
                        run.layers[name],
                        targets[name],
                        wants.of(name),
                        found.leading[name],
                        queries.get(name),
                        behind.get(name),
                        file,
                    )
                    for name in targets
                ]
                if ROUNDING in extras and by_gradient:
                    others = stack.enter_context(Others(model, targets))
            if images and image_shape(inputs) != run.input_shape:
                raise InputError(
                    f"the loader gives images of {image_shape(inputs)} after images of {run.input_shape}; MACs and "
                    "tokens depend on the size, so calibrate with one"
                )
            if images > 1 and not ordered:
                ordered = True
                _order(model, taps, inputs)
            if images:
                run.whole = False
                for tap in taps:
                    tap.forward(images)
                with torch.set_grad_enabled(needs_gradient):
                    output = call(model, inputs)
                    if needs_gradient:
                        seeds = image_seeds(tensors(given), wanted.seed)
                        if loss_fn is not None:
                            losses = [scalar(loss_fn(output, batch))]
                        else:
                            picked = output_fn(output) if output_fn is not None else output
                            if not run.answer:
                                _say(run, what_is(model, picked)[1], picked)
                            losses = sampled_losses(model, picked, seeds, wanted.samples)
                            doubts.append(largest_doubt(model, picked))
                            del picked
                        _backward(losses, taps, sketches(seeds, wanted.samples, taps), others, run)
                        del losses
                    del output  # its graph holds activations, which the next batch's would come on top of
                run.images += images
                run.whole = True
            seen = sum(processes.gather(run.images))
            if on_batch is not None:
                on_batch(run)
            if progress is not None:
                progress(seen, images_of(share.loader))
    if run is None:
        raise InputError("the loader gave no image; calibration needs at least one (a few hundred are better)")
    together(run)
    everywhere(run)
    doubt = max(processes.gather(max((float(found) for found in doubts), default=0.0)))
    run.check_finite()
    if by_gradient and loss_fn is None and doubt < _DOUBT:
        run.notes["certain"] = doubt
        _logger.warning("%s", certain(doubt))
    if run.images < FEW:
        _logger.warning(
            "calibrated on %d images: plan and predicted error fit these few; some hundreds are needed",
            run.images,
        )
    if by_gradient and not any(layer.held["gradient"].any() for layer in run.layers.values()):
        raise InputError(
            "no gradient reached any layer: the model's answer does not depend on them (is its head still all zeros?); "
            "load trained weights, or calibrate with objective='output'"
        )
    return _to_cpu(run)


def check_finite(model: nn.Module) -> None:
    """Raise `NumericalError` naming the first parameter that holds NaN or Inf: every answer would."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise NumericalError(f"{name} holds NaN or Inf; check the weights, or load them again in float32")


def _order(model: nn.Module, taps: Sequence[Tap], inputs: Any) -> None:
    """Tell the taps that split rows by image how these lie in a batch."""
    by_image = {tap.stats.name: tap.linear for tap in taps if tap.of_images}
    if not by_image:
        return
    for tap in taps:
        tap.asleep = True
    apart = strided_layers(model, by_image, first_images(inputs, 2), one_image(inputs))
    for tap in taps:
        tap.strided, tap.asleep = tap.stats.name in apart, False


def _say(run: Statistics, what: str, answer: Any) -> None:
    """Note what the model's answer is taken for; a warning where it is one of several tensors."""
    run.answer = what
    count = sum(1 for t in tensors_in(answer) if t.ndim)
    level = logging.WARNING if count > 1 and "so named" not in what else logging.INFO
    more = f"; it is the first of {count} tensors, output_fn= picks another" if count > 1 else ""
    _logger.log(level, "the model's answer is taken for %s%s", what, more)


def _backward(
    losses: Sequence[Tensor],
    taps: Sequence[Tap],
    sketched: Sequence[Tensor | None],
    others: Others | None,
    run: Statistics,
) -> None:
    """Backward passes of all losses; `InputError` naming the layers that no gradient arrives at."""
    for index, loss in enumerate(losses):
        for tap in taps:
            tap.backward(sketched[index])
        if not loss.requires_grad:
            raise InputError(
                "no gradient reaches the layers: the model's answer does not depend on them through autograd "
                "(no_grad or detach?); output_fn= picks another part of the answer, objective='output' needs none"
            )
        loss.backward(retain_graph=index + 1 < len(losses))
        if others is not None:
            others.add(run.others)
    cut_off = [tap.stats.name for tap in taps if not tap.gradient_seen]
    if cut_off:
        raise InputError(
            f"no gradient arrives at {len(cut_off)} layers ({some(cut_off)}): "
            "they serve another output, or are cut off by no_grad or detach; leave them out with exclude=, pick what "
            "counts with output_fn=, or calibrate with objective='output'"
        )


def _empty(targets: Mapping[str, nn.Linear], found: Probe, shape: Any) -> Statistics:
    layers = {
        name: LayerStatistics(name, linear.in_features, linear.out_features, found.owners[name])
        for name, linear in targets.items()
    }
    weights = fingerprint({name: linear.weight for name, linear in targets.items()})
    return Statistics(layers, weights, macs=found.macs, input_shape=shape)


def _device(targets: Mapping[str, nn.Linear]) -> torch.device:
    return next(iter(targets.values())).weight.device


def _file(folder: str | None, device: torch.device) -> Mapped | None:
    """Where the sums lie, if not in memory."""
    if folder is not None and not triangles(device):
        raise InputError(
            f"sums_in={folder!r} is for a model on the CPU; this one is on {device}, where its sums lie too"
        )
    return None if folder is None else Mapped(folder)


def _remove(taps: list[Tap]) -> None:
    for tap in taps:
        tap.remove()


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _to_cpu(stats: Statistics) -> Statistics:
    for layer in stats.layers.values():
        layer.held = {key: layer.packed(key).cpu() for key, _ in layer.own()}
    stats.others = {name: lost.cpu() for name, lost in stats.others.items()}
    share_moments(stats.layers)
    return stats
