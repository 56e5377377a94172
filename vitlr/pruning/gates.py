"""Learnable gates `x diag(a)` before the linears of a block: put in, read, taken off. Source: arXiv 2104.08500."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitlr.anatomy import visibility
from vitlr.errors import InputError, NumericalError
from vitlr.nn import LowRankLinear
from vitlr.nn._plain import has_hooks
from vitlr.pruning.options import KINDS
from vitlr.pruning.sites import Site, sites
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import put


class Gate(nn.Module):
    """`x diag(a)`: x [..., K], a [K], one importance score for every channel, 1 at the start."""

    def __init__(self, site: Site, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.site = site
        self.a = nn.Parameter(torch.ones(site.width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a

    def extra_repr(self) -> str:
        return f"{self.site.kind}, width={self.site.width}"


class GatedLinear(nn.Module):
    """`y = linear(x diag(a))` in place of `linear`; the linears that read one tensor share one gate."""

    def __init__(self, linear: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.linear, self.gate = linear, gate
        self.training = linear.training

    @property
    def in_features(self) -> int:
        """K, that of the linear."""
        return int(self.linear.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """N, that of the linear."""
        return int(self.linear.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.gate(x))
        return out


def add_gates(model: nn.Module, kinds: str | Iterable[str] = KINDS, *, inplace: bool = False) -> nn.Module:
    """Put gates of 1 before the linears of every known attention and MLP: the same function; a new model by default.

    `kinds`: some of qkv, proj, fc1, fc2. Raises `InputError` for a model without such blocks (named, with what is
    supported), with gates already, and for layers with hooks, which would see other inputs.
    """
    if gates(model):
        raise InputError("this model has gates already; take them off first (remove_gates)")
    with visibility.visible(model, keep=inplace):
        found = sites(model, kinds)
        hooked = [name for site in found.values() for name in site.readers if has_hooks(model.get_submodule(name))]
        if hooked:
            raise InputError(f"layer {hooked[0]} has hooks, and gates would change what they see; take them off first")
        model = model if inplace else duplicate(model)
    for site in found.values():
        like = next(model.get_submodule(site.name).parameters())
        gate = Gate(site, like.device, like.dtype)
        for name in site.readers:
            put(model, name, GatedLinear(model.get_submodule(name), gate))
    return model


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a model by the name of their site, in module order."""
    return {module.site.name: module for module in model.modules() if isinstance(module, Gate)}


def penalty(model: nn.Module) -> Tensor:
    """`‖a‖₁` over all gates of a model, the term that drives them to zero."""
    found = gates(model)
    if not found:
        raise InputError("this model has no gates; put them in first (add_gates)")
    return torch.stack([gate.a.abs().sum() for gate in found.values()]).sum()


def scores(model: nn.Module) -> dict[str, Tensor]:
    """`|a|` of every site, in float64 on the CPU. Raises `NumericalError` where a gate is NaN or Inf."""
    found = {name: gate.a.detach().abs().double().cpu() for name, gate in gates(model).items()}
    for name, score in found.items():
        if not torch.isfinite(score).all():
            raise NumericalError(f"the gates of {name} hold NaN or Inf: the training diverged; lower its learning rate")
    return found


@torch.no_grad()
def remove_gates(model: nn.Module, *, fold: bool = True, inplace: bool = False) -> nn.Module:
    """Take the gates off; with `fold`, `W diag(a)` takes their place: the same function on the linears there were.

    A `LowRankLinear` takes them into B. Without `fold` what a gate scaled is scaled no more, as if `a` were 1.
    """
    model = model if inplace else duplicate(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, GatedLinear):
            continue
        linear = module.linear
        if fold:
            reads = linear.down if isinstance(linear, LowRankLinear) else linear
            assert isinstance(reads, nn.Linear)
            reads.weight.mul_(module.gate.a)
        put(model, name, linear.train(module.training))
    visibility.put_back(model)
    return model
