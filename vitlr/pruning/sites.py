"""Where gates go: the four tensors of a transformer block whose channels a linear reads and that can be removed.

    qkv   what the attention reads             columns of q, k and v go          (the residual stream keeps its width)
    proj  the heads side by side               columns of proj and rows of v go
    fc1   what the MLP reads                   columns of fc1 go                 (the residual stream keeps its width)
    fc2   the hidden neurons                   columns of fc2 and rows of fc1 go

Source: arXiv 2104.08500, figure 2.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.anatomy.attention import SUPPORTED as ATTENTIONS
from vitlr.anatomy.attention import attentions
from vitlr.anatomy.mlps import SUPPORTED as MLPS
from vitlr.anatomy.mlps import find_mlps, refused_mlps
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear
from vitlr.pruning.options import ATTENTION, FEED_FORWARD, KINDS, parse_kinds


@dataclass(frozen=True)
class Site:
    """One gated tensor `x [..., width]`, by the names of the linears around it.

    `readers` multiply x. Channel j of x is row `first + j` of each of `writers` (and row `first + width + j` where
    they are `packed`, gate and value in one); none where x comes from the residual stream.
    """

    kind: str
    parent: str
    width: int
    readers: tuple[str, ...]
    writers: tuple[str, ...] = ()
    first: int = 0
    packed: bool = False

    @property
    def name(self) -> str:
        """The name of the first linear that reads x."""
        return self.readers[0]


@visibility.seeing
def sites(model: nn.Module, kinds: str | Iterable[str] = KINDS) -> dict[str, Site]:
    """All sites of these kinds by name, in module order. Raises `InputError` with reasons where a model has none."""
    asked = parse_kinds(kinds)
    heads, no_heads = attentions(model) if set(asked) & set(ATTENTION) else ({}, {})
    mlps, no_mlps = (find_mlps(model), refused_mlps(model)) if set(asked) & set(FEED_FORWARD) else ({}, {})
    hidden = linears.survey(model).hidden
    found: list[Site] = []
    for name, a in heads.items():
        width = _read_width(model, a.inputs)
        if width is not None and _plain(model, (*a.inputs, a.output), hidden):
            found.append(Site("qkv", name, width, a.inputs))
            found.append(Site("proj", name, a.width, (a.output,), (a.value,), a.first))
        else:
            no_heads[name] = "its linears are neither plain nor low-rank"
    for name, mlp in mlps.items():
        first, second = mlp.linears[:-1], mlp.linears[-1]
        width = _read_width(model, first)
        if width is not None and _plain(model, mlp.linears, hidden):
            found.append(Site("fc1", name, width, first))
            found.append(Site("fc2", name, mlp.width, (second,), first, packed=mlp.packed))
        else:
            no_mlps[name] = "its linears are neither plain nor low-rank"
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = sorted((site for site in found if site.kind in asked), key=lambda site: order[site.name])
    for wanted, what, refused, known in (
        (ATTENTION, "attention", no_heads, ATTENTIONS),
        (FEED_FORWARD, "feed-forward", no_mlps, MLPS),
    ):
        if set(asked) & set(wanted) and not any(site.kind in wanted for site in found):
            raise InputError(_nothing(model, what, refused, known))
    return {site.name: site for site in found}


def refused(model: nn.Module) -> dict[str, str]:
    """Attentions and MLPs that can have no gates, each with the reason."""
    return {**attentions(model)[1], **refused_mlps(model)}


@dataclass(frozen=True)
class Layer:
    """One linear around sites: shape, rank (None where dense), bias, and the sites whose channels it reads or writes.

    Removing one channel of `writes` takes `copies` rows.
    """

    K: int
    N: int
    rank: int | None
    bias: bool
    reads: str | None
    writes: str | None
    copies: int

    def params(self, sites: Mapping[str, Site], kept: Mapping[str, int]) -> int:
        """Parameters that are left where `kept` says how many channels of a site are."""
        K = self.K - (sites[self.reads].width - kept[self.reads] if self.reads else 0)
        N = self.N - self.copies * (sites[self.writes].width - kept[self.writes] if self.writes else 0)
        low = self.rank is not None and self.rank <= min(K, N)  # a rank above that is multiplied out
        return (self.rank * (K + N) if low and self.rank is not None else N * K) + N * self.bias


def layers(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Layer]:
    """The linears around the sites, by name."""
    reads = {name: site.name for site in sites.values() for name in site.readers}
    writes = {name: site for site in sites.values() for name in site.writers}
    found = {}
    for name in dict.fromkeys([*reads, *writes]):
        linear: Any = plain(model.get_submodule(name))
        up = linear.up if isinstance(linear, LowRankLinear) else linear
        site = writes.get(name)
        found[name] = Layer(
            linear.in_features,
            linear.out_features,
            linear.rank if isinstance(linear, LowRankLinear) else None,
            up.bias is not None,
            reads.get(name),
            None if site is None else site.name,
            2 if site is not None and site.packed else 1,
        )
    return found


def params(layers: Mapping[str, Layer], sites: Mapping[str, Site], kept: Mapping[str, int]) -> dict[str, int]:
    """Parameters of every layer with `kept` channels at every site; those of layers at two sites are counted once."""
    return {name: layer.params(sites, kept) for name, layer in layers.items()}


def saved_by_one(layers: Mapping[str, Layer], site: Site) -> int:
    """Parameters that go with one channel of a site while all others are there."""
    columns = rows = 0
    for layer in layers.values():
        if layer.reads == site.name:
            columns += layer.N if layer.rank is None else layer.rank
        if layer.writes == site.name:
            rows += layer.copies * ((layer.K if layer.rank is None else layer.rank) + layer.bias)
    return columns + rows


def plain(module: nn.Module) -> nn.Module:
    """The linear itself, where gates stand before it."""
    inner = module._modules.get("linear") if "gate" in module._modules else None
    return module if inner is None else inner


def _read_width(model: nn.Module, names: tuple[str, ...]) -> int | None:
    widths = {getattr(model.get_submodule(name), "in_features", None) for name in names}
    width = widths.pop()
    return None if widths else width


def _plain(model: nn.Module, names: tuple[str, ...], hidden: Container[str]) -> bool:
    """Whether these are linears whose columns and rows can be taken out, each with weights of its own."""
    return all(type(model.get_submodule(n)) in (nn.Linear, LowRankLinear) and n not in hidden for n in names)


def _nothing(model: nn.Module, what: str, refused: Mapping[str, str], known: str) -> str:
    for name, reason in refused.items():
        return f"{type(model).__qualname__} has no {what} block to prune; {name}: {reason}"
    return f"{type(model).__qualname__} has no {what} block to prune. Supported: {known}"
