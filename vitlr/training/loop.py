"""The training loop: plain PyTorch around timm's optimizers, schedules and mixing."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.data.seeds import derived_seed
from vitlr.errors import InputError
from vitlr.measuring.losses import divergence, first_tensor
from vitlr.nn import LowRankLinear
from vitlr.runtime import processes
from vitlr.runtime.contexts import autocast, evaluation_mode, plain_attention, seeded
from vitlr.runtime.fields import keywords
from vitlr.runtime.modules import device_of, read_freely
from vitlr.runtime.progress import Progress, shows
from vitlr.runtime.snapshots import Snapshots
from vitlr.runtime.storage import fingerprint
from vitlr.training.batches import Batch, batches, reseed
from vitlr.training.epochs import Epochs
from vitlr.training.recipe import TrainRecipe
from vitlr.training.report import TrainReport

Loss = Callable[[Tensor, Tensor], Tensor]
Numbers = dict[str, Tensor | float]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class TrainStep:
    """What a callback sees after an update: the model, updates done of how many, their epoch, the loss, the rate."""

    model: nn.Module
    updates: int
    total: int
    epoch: int
    loss: float
    lr: float


@shows("training", "updates")
@keywords(TrainRecipe)
def train(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: TrainRecipe | None = None,
    *,
    loss: Loss | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    reference: nn.Module | None = None,
    callbacks: Sequence[Callable[[TrainStep], None]] = (),
    validate: Callable[[nn.Module], float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> TrainReport:
    """Train `model` in place on `(1 - w) task + w T² KL(reference ‖ model) + penalty(model)`; w = 0 without reference.

    `recipe` says how, or keywords of its names do.

    `loader` yields `(images [B, C, H, W], labels [B])`: one of `vitlr.data.open_data`, which is then shuffled and
    augmented as the recipe says, or any that has a length and can be gone through again, which does that itself.
    `loss(logits, targets)` replaces cross entropy; targets are `[B, classes]` where images are mixed. `reference` is
    the dense model for distillation. `callbacks` are called after every update. `validate(model)` judges every epoch,
    higher being better, on images held out for that. Frozen parameters stay frozen; modes are given back.

    A loss or a weight that is no number ends the training with the best weights so far, and a note in the report.
    Several processes share the images of every batch, which all must be given alike, and their gradients are added up
    in a fixed order; `loss` is then a mean over images, and process 0 validates.

    The same seed gives the same bits. `resume` names a folder for snapshots, from which an interrupted training goes
    on to the same bits; nothing random is stored, since all draws depend only on the seed and the step.

    Raises `InputError` for loaders without length, images or fitting labels, models without trainable parameters that
    a gradient reaches or in half precision, references with other classes, and snapshots of another run.
    """
    recipe = TrainRecipe.of(recipe, **changes)
    _check(model, reference)
    source = batches(loader, recipe)
    per_epoch = source.per_epoch // recipe.grad_accum_steps
    if per_epoch == 0:
        raise InputError(f"the loader has {source.per_epoch} batches, grad_accum_steps={recipe.grad_accum_steps}")
    run = {
        "model": fingerprint(dict(model.named_parameters())),
        "reference": None if reference is None else fingerprint(dict(reference.named_parameters())),
        "batches": source.per_epoch,
        "data": source.fingerprint,
        "recipe": recipe.to_dict(),
    }
    processes.check_same("model", run["model"])
    snapshots = Snapshots(resume, run)
    for module in model.modules():
        if isinstance(module, LowRankLinear) and all(p.requires_grad for p in module.parameters()):
            module.balance()

    objective = _Objective(model, reference, recipe, loss, penalty)
    with _training(model, reference):
        state = Epochs(model, recipe, per_epoch, snapshots)
        # A part of an epoch that is too small for an update is left out, so epochs begin where the loader's do.
        with closing(_epochs(source, state.updates, per_epoch, recipe.grad_accum_steps)) as stream:
            while not state.over:
                value = _update(state, stream, objective)
                if value is None:
                    break
                for callback in callbacks:
                    epoch, total = len(state.epochs) + 1, per_epoch * recipe.epochs
                    callback(TrainStep(model, state.updates, total, epoch, float(value), state.lr))
                if state.updates % per_epoch == 0:
                    _end_epoch(state, validate)
                elif state.updates % recipe.recovery_interval == 0:
                    state.save()
                if progress is not None:
                    progress(state.updates, state.total)
        return state.finish()


class _Objective:
    """The loss of one batch, and its parts as numbers."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module | None,
        recipe: TrainRecipe,
        loss: Loss | None,
        penalty: Callable[[nn.Module], Tensor] | None,
    ) -> None:
        self.model, self.reference, self.recipe, self.penalty = model, reference, recipe, penalty
        smoothing = 0.0 if recipe.mixes else recipe.smoothing  # mixing smooths its own targets
        self.loss = loss or (lambda logits, targets: F.cross_entropy(logits, targets, label_smoothing=smoothing))
        self.device = device_of(model)
        self.mix: Any = None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Numbers]:
        images, targets = self._mixed(images, labels)
        own, weight = processes.part(images)
        images, targets = images[own], targets[own]
        if processes.rank():  # what is drawn in layers is drawn for these images
            torch.manual_seed(derived_seed(torch.initial_seed(), "process", processes.rank()))
        with autocast(self.device, self.recipe.amp):
            logits = first_tensor(self.model(to_model(self.model, images)))
        logits = logits.float()
        if not self.recipe.mixes:
            _check_labels(targets, logits)
        value = self.loss(logits, targets.to(logits.device))
        parts = {"task": _number(value)}
        if self.reference is not None:
            distance = divergence(self._expected(images, logits), logits, True, self.recipe.distill_temperature)
            parts["distillation"] = _number(distance)
            w = self.recipe.distill_loss_weight
            value = (1 - w) * value + w * distance
        if self.penalty is not None:
            added = self.penalty(self.model)
            parts["penalty"] = _number(added)
            value = value + added
        parts["loss"] = _number(value)
        if processes.world() == 1:
            return value, parts
        means = processes.gather({name: weight * number for name, number in parts.items()})
        return weight * value, {name: sum(mean[name] for mean in means) for name in parts}

    def _expected(self, images: Tensor, logits: Tensor) -> Tensor:
        assert self.reference is not None
        with torch.no_grad(), autocast(device_of(self.reference), self.recipe.amp):
            expected = first_tensor(self.reference(to_model(self.reference, images)))
        if expected.shape != logits.shape:
            raise InputError(f"the reference answers {list(expected.shape)}, the model {list(logits.shape)}")
        return expected.to(logits.device).float()

    def _mixed(self, images: Tensor, labels: Tensor) -> Batch:
        if not self.recipe.mixes:
            return images, labels
        if labels.ndim != 1:
            raise InputError("labels are shares of classes already; mixup and cutmix need one class an image")
        if self.mix is None:
            self.mix = _mixup(self.model, images[:1], self.recipe)
        even = len(images) // 2 * 2  # timm mixes pairs
        _check_range(labels, self.mix.num_classes)
        return self.mix(images[:even].clone(), labels[:even])  # timm mixes in place


def _number(value: Tensor) -> Tensor | float:
    """As a float; of one process on a device that runs behind still there, where it is not waited for."""
    value = value.detach()
    return float(value) if read_freely(value) or processes.world() > 1 else value.double()


def _update(state: Epochs, stream: Iterator[list[Batch]], objective: _Objective) -> Tensor | float | None:
    """One update; the loss, or None where it was no number and nothing was done."""
    group = next(stream)
    reseed(derived_seed(state.recipe.seed, "update", state.updates))
    sums: Numbers = {}
    for images, labels in group:
        if len(images) < 1 + objective.recipe.mixes:
            continue  # all its files were corrupt
        value, parts = objective(images, labels)
        if not state.add(value, len(group)):
            return None
        state.images += len(images)
        for part, number in parts.items():
            sums[part] = sums.get(part, 0.0) + number / len(group)
    state.update()
    for part, number in sums.items():
        state.sums[part] = state.sums.get(part, 0.0) + number
    return sums.get("loss", 0.0)


def _end_epoch(state: Epochs, validate: Callable[[nn.Module], float] | None) -> None:
    if not state.images:
        raise InputError("no image of the first epoch could be read, so nothing was learnt; check the data")
    if not state.read():
        return
    if not state.finite():
        state.note = f"weights were no numbers after epoch {len(state.epochs) + 1}: kept the best before it"
        return
    validation = None
    if validate is not None:
        with state.judged(), evaluation_mode(state.model):
            validation = processes.agreed(lambda: float(validate(state.model)))
    state.end_epoch(validation)


def _epochs(source: Any, updates: int, per_epoch: int, accumulate: int) -> Generator[list[Batch]]:
    """The batches of one update after another, from the given update on."""
    epoch, done = divmod(updates, per_epoch)
    while True:
        stream = source.start(epoch * source.per_epoch + done * accumulate)
        for _ in range(done, per_epoch):
            yield [next(stream) for _ in range(accumulate)]
        epoch, done = epoch + 1, 0


@contextmanager
def _training(model: nn.Module, reference: nn.Module | None) -> Iterator[None]:
    """Train mode, gradients, and random generators that are the caller's again afterwards."""
    models = [model] if reference is None else [model, reference]
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    modes = [(module, module.training) for module in model.modules()]
    with (
        seeded(0),
        torch.random.fork_rng(cuda),
        torch.enable_grad(),
        plain_attention(*models),
        evaluation_mode(reference if reference is not None else nn.Identity()),
    ):
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _mixup(model: nn.Module, image: Tensor, recipe: TrainRecipe) -> Any:
    from timm.data import Mixup

    with torch.no_grad(), evaluation_mode(model):
        classes = first_tensor(model(to_model(model, image))).shape[1]
    return Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=classes,
    )


def _check_labels(targets: Tensor, logits: Tensor) -> None:
    if logits.ndim != 2:
        raise InputError(f"the model returned {list(logits.shape)}, expected logits [images, classes]")
    if targets.ndim == 1:
        _check_range(targets, logits.shape[1])


def _check_range(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"labels from {low} to {high}, the model has {classes} classes; give a class map")


def _check(model: nn.Module, reference: nn.Module | None) -> None:
    if model is reference:
        raise InputError("model and reference are the same object; pass the dense model as reference")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise InputError("every parameter of the model is frozen; training needs some with requires_grad")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise InputError(
                f"{name} is {parameter.dtype}; training works in float32 and autocasts itself; cast afterwards"
            )
    counting = [name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)]
    if counting and processes.world() > 1:
        raise InputError(
            f"{counting[0]} takes means over a batch, and every process has a part of it; train this model by one "
            "process, or make it torch.nn.SyncBatchNorm"
        )
    if torch.is_inference_mode_enabled():
        raise InputError("training needs gradients and cannot run under torch.inference_mode(); call it outside")
