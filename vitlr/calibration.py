"""Calibration: let images flow through the model once and add up what every linear layer sees and sends back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitlr import cost, surfaces
from vitlr.errors import InputError, VitlrError
from vitlr.inputs import call, count_images, image_shape, one_image, tensors, to_model
from vitlr.losses import first_tensor, image_seeds, sampled_losses
from vitlr.modes import evaluation_mode, frozen_parameters
from vitlr.statistics import EXTRAS, OBJECTIVES, LayerStatistics, Statistics, fingerprint
from vitlr.taps import Tap

Progress = Callable[[int, "int | None"], None]


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    objective: str | Sequence[str] = "loss",
    extras: Sequence[str] = (),
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
    more of "loss" (gradient moments too, see `vitlr.losses`), "output" and "normalized" (arXiv 2402.06004);
    `extras` what the baselines need. `loss_fn(output, batch)` replaces the sampled loss by a scalar summed over the
    images, `output_fn(output)` picks the tensor to sample from; `samples` targets are drawn per image.
    `stats` continues an earlier run in place, `on_batch` sees the running statistics after every batch. The model comes
    back as it was.

    Raises `InputError` for an empty loader, layers that no image reaches, `torch.inference_mode`, and
    `NumericalError` (naming the layer) for NaN or Inf.
    """
    if isinstance(loader, Tensor):
        raise InputError("the loader is one tensor; give batches, such as [images] or images.split(50)")
    objectives = (objective,) if isinstance(objective, str) else tuple(objective)
    _check_choice("objective", objectives, OBJECTIVES)
    _check_choice("extra", extras, EXTRAS)
    if samples < 1:
        raise InputError(f"samples={samples}, expected at least one draw per image")
    if torch.is_inference_mode_enabled():
        raise InputError("calibrate needs gradients and cannot run under torch.inference_mode(); call it outside")
    needs_gradient = "loss" in objectives or "row_gradient" in extras

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(frozen_parameters(model))
        stack.enter_context(surfaces.visible(model))
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        targets = surfaces.targets(model, include=include, exclude=exclude)
        run: Statistics | None = None
        taps: list[Tap] = []
        stack.callback(_remove, taps)
        for batch in loader:
            inputs = to_model(model, batch)
            images = count_images(inputs)
            if images == 0:
                continue
            if run is None:
                fresh = _probe(model, targets, one_image(inputs))
                fresh.objectives, fresh.extras = objectives, tuple(extras)
                fresh.samples, fresh.seed = samples, seed
                if stats is not None:
                    stats.check_addable(fresh)
                run = stats or fresh
                taps += [Tap(run.layers[n], targets[n], {*objectives, *extras}) for n in targets]
            for tap in taps:
                tap.images, tap.in_backward = images, False
            with torch.set_grad_enabled(needs_gradient):
                output = call(model, inputs)
                if needs_gradient:
                    if loss_fn is not None:
                        losses = [loss_fn(output, batch)]
                    else:
                        picked = output_fn(output) if output_fn is not None else first_tensor(output)
                        seeds = image_seeds(tensors(inputs)[0], seed)
                        losses = sampled_losses(model, picked, seeds, samples)
                    for tap in taps:
                        tap.in_backward = True
                    for index, loss in enumerate(losses):
                        loss.backward(retain_graph=index + 1 < len(losses))
            run.images += images
            if on_batch is not None:
                on_batch(run)
            if progress is not None:
                progress(run.images, _total(loader))
    if run is None:
        raise InputError("the loader gave no image; calibration needs at least one (a few hundred are better)")
    run.check_finite()
    if "loss" in objectives and not any(layer.sum("gradient").any() for layer in run.layers.values()):
        raise InputError(
            "no gradient reached any layer: the model's answer does not depend on them (is its head still all zeros?); "
            "load trained weights, or calibrate with objective='output'"
        )
    return _to_cpu(run)


def _remove(taps: list[Tap]) -> None:
    for tap in taps:
        tap.remove()


def _check_choice(what: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown or (what == "objective" and not chosen):
        raise InputError(f"unknown {what} {unknown[0] if unknown else '()'!r}, expected one of {', '.join(known)}")


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _probe(model: nn.Module, targets: Mapping[str, nn.Linear], image: Any) -> Statistics:
    """Send one image through: proves that every target fires, finds who shares an input, counts the MACs."""
    sources: dict[str, Tensor] = {}  # holding the inputs keeps their identities apart
    handles = [linear.register_forward_pre_hook(_remember(sources, name)) for name, linear in targets.items()]
    try:
        macs = cost.count_macs(model, image)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, VitlrError):
            raise
        given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors(image))
        raise InputError(
            f"the model cannot take an image of the loader ({given}, with its batch dimension): {cause}"
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in targets if name not in sources]
    if silent:
        raise InputError(
            f"{len(silent)} linear layers are never called ({', '.join(silent[:4])}{', …' * (len(silent) > 4)}): "
            "the model reads their weights itself or does not use them, and replacing them would change nothing; "
            "leave them out with exclude="
        )
    owners: dict[int, str] = {}
    layers = {}
    for name, linear in targets.items():
        n, k = linear.out_features, linear.in_features
        owner = owners.setdefault(id(sources[name]), name) if n > k else name
        layers[name] = LayerStatistics(name, k, n, owner)
    weights = fingerprint({name: linear.weight for name, linear in targets.items()})
    return Statistics(layers, weights, macs=macs, input_shape=image_shape(image))


def _remember(sources: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        sources.setdefault(name, args[0])

    return hook


def _total(loader: Any) -> int | None:
    """How many images the loader will give, where it says so."""
    try:
        return int(loader.images) if hasattr(loader, "images") else len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _to_cpu(stats: Statistics) -> Statistics:
    for layer in stats.layers.values():
        for key, tensor in list(layer.sums()):
            setattr(layer, key, tensor.cpu())
    for layer in stats.layers.values():
        layer.moment = stats.layers[layer.owner].moment
    return stats
