"""Where a training stands: weights, their running mean, the best of them, optimizer and updates; saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.measuring.losses import check_reached
from vitlr.runtime import processes
from vitlr.runtime.kinds import NONE, PLAIN, check, number, text, whole
from vitlr.runtime.modules import read_freely
from vitlr.runtime.snapshots import Snapshots, check_like, copied, restore, stored
from vitlr.training.optimizers import check_optimizer, optimizer_state, restore_optimizer


class State:
    """A training of `model` in place; who trains says the schedule, the clipping and the decay of the running mean.

    What is judged and kept are the running means of all weights and buffers, where `decay` says there are any. `values`
    name the plain attributes that a snapshot called `name` holds, `unit` what an update is called in notes.
    """

    name, unit = "state", "update"
    values: tuple[str, ...] = ("updates", "best_validation", "note")
    kinds: Mapping[str, Any] = {"updates": whole(0), "best_validation": number() | NONE, "note": text(2000)}

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, snapshots: Snapshots, mean: bool) -> None:
        self.model, self.optimizer, self.snapshots = model, optimizer, snapshots
        self.mean = copied(model) if mean else None
        self.best = copied(model)
        self.updates, self.best_validation, self.note = 0, -math.inf, ""
        self.total: int | None = None
        self.wrong: Tensor | None = None  # on a device that runs behind, the update whose loss was no number, or 0

    def schedule(self) -> None:
        """Set the rates of the update to come, the `updates`-th from 0 on."""
        raise NotImplementedError

    def clip(self, parameters: list[nn.Parameter]) -> None:
        """Bound the gradients."""
        raise NotImplementedError

    def decay(self) -> float:
        """What the running mean keeps of itself at the update to come."""
        raise NotImplementedError

    @property
    def over(self) -> bool:
        return bool(self.note) or (self.total is not None and self.updates >= self.total)

    def add(self, loss: Tensor, parts: int = 1) -> bool:
        """Add a loss's gradient, one of so many parts; one that is no number ends the training and changes nothing.

        Of several processes each adds that of its own images, and the sum of all is the loss. On a device that runs
        behind it is not waited for: `read` tells, before anything is judged or saved.
        """
        check_reached(loss)
        total = processes.total(loss.detach())
        if not read_freely(total):
            before = torch.zeros_like(total) if self.wrong is None else self.wrong
            self.wrong = torch.where((before == 0) & ~total.isfinite(), self.updates + 1, before)
        elif not math.isfinite(value := float(total)):
            self.note = f"the loss was {value} at {self.unit} {self.updates + 1}: stopped, kept the best before it"
            self.optimizer.zero_grad(set_to_none=True)
            return False
        (loss / parts).backward()
        return True

    def read(self) -> bool:
        """Whether all losses so far were numbers; ends the training where one was none."""
        first = 0 if self.wrong is None else int(self.wrong)
        if first and not self.note:
            self.note = f"the loss was no number at {self.unit} {first}: stopped, kept the best before it"
        return not first

    def update(self) -> None:
        """Clip, step, follow with the running mean; gradients are gone afterwards."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        processes.sum_in_order(gradients)
        processes.spread(gradients)
        self.clip([p for p in self.model.parameters() if p.grad is not None])
        self.schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mean is not None:
            _follow(self.mean, stored(self.model), self.decay())
        self.updates += 1

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """The model with the weights that are judged and kept, which it has for as long as this lasts."""
        own = None if self.mean is None else copied(self.model)
        if self.mean is not None:
            restore(self.model, self.mean)
        try:
            yield self.model
        finally:
            if own is not None:
                restore(self.model, own)

    def judge(self, validation: float | None) -> bool:
        """Keep the judged weights where `validation`, higher being better, is the best so far, or None."""
        better = validation is None or validation > self.best_validation
        if better:
            with self.judged() as model:
                self.best = copied(model)
            self.best_validation = -math.inf if validation is None else validation
        return better

    def save(self) -> None:
        if self.snapshots.folder is None or not self.read():
            return
        tensors = {f"weight.{name}": t for name, t in stored(self.model).items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        tensors |= {f"mean.{name}": t for name, t in (self.mean or {}).items()}
        moments, plain = optimizer_state(self.optimizer)
        state = {key: getattr(self, key) for key in self.values}
        state["best_validation"] = None if self.best_validation == -math.inf else self.best_validation
        self.snapshots.save(self.name, tensors | moments, {**state, "optimizer": plain})

    def resume(self) -> bool:
        """Go on from the snapshot; False where there is none."""
        found = self.snapshots.load(self.name, {"*": PLAIN})
        if found is None:
            return False
        tensors, state = found
        path = self.snapshots.found(self.name)
        if not {*self.values, "optimizer"} <= set(state):
            raise InputError(
                f"{path} was kept in the middle of a run by an earlier vitlr, and this one "
                "cannot go on from there; remove that file, or name another folder"
            )
        where = f"{path} is damaged, remove it"
        check({key: state[key] for key in self.values}, {**self.kinds}, where)
        for prefix in ("weight.", "best.", *(["mean."] if self.mean is not None else [])):
            check_like(_under(prefix, tensors), self.model, f"{where}: {prefix.rstrip('.')}")
        check_optimizer(self.optimizer, _under("optimizer.", tensors), state["optimizer"], where)
        for key in self.values:
            setattr(self, key, state[key])
        self.best_validation = -math.inf if self.best_validation is None else self.best_validation
        restore(self.model, _under("weight.", tensors))
        device = next(self.model.parameters()).device
        self.best = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}
        if self.mean is not None:
            self.mean = {name: tensor.to(device) for name, tensor in _under("mean.", tensors).items()}
        restore_optimizer(self.optimizer, _under("optimizer.", tensors), state["optimizer"])
        return True


@torch.no_grad()
def _follow(mean: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """`mean ← decay mean + (1 - decay) weights`; whole numbers are copied."""
    floating = [name for name, tensor in mean.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([mean[name] for name in floating], [weights[name] for name in floating], 1 - decay)
    for name in mean.keys() - set(floating):
        mean[name].copy_(weights[name])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
