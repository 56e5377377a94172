"""The hidden neurons of a forward, from the linear that makes them to the one that reads them."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from vitlr.anatomy.channelwise import is_channelwise, is_map, linear_in
from vitlr.nn._formula import Formula
from vitlr.runtime.modules import join

FUNCTIONS = {F.gelu, F.silu, F.relu, F.sigmoid, F.tanh, F.hardswish, F.dropout, torch.relu, torch.sigmoid, torch.tanh}


class NotOne(Exception):
    """Why a module is no MLP whose neurons stand each for itself."""


class Pair(NamedTuple):
    """The linears around hidden neurons by name: gate and value in one, or two, or the only one before the second.

    `between`: layers of which channel j is neuron j's.
    """

    first: tuple[str, ...]
    second: str
    packed: bool
    between: tuple[str, ...] = ()


_LINEAR = r"([^ ()]+)\(x\)"
_WHOLE = re.compile(_LINEAR)
_HALF = re.compile(rf"halves of {_LINEAR}|{_LINEAR}\[[01]\]")
_GATED = re.compile(rf"{_LINEAR} \* (?!\1\(){_LINEAR}")
_PACKED = re.compile(rf"{_LINEAR}\[([01])\] \* \1\(x\)\[(?!\2)[01]\]")
_RETURNED = "its hidden neurons are part of what it returns"


class Hidden(Formula):
    """Follows the hidden neurons from the first linears to the second: `fc1(x)`, `fc1(x)[0] * fc1(x)[1]`.

    What treats every neuron alone is left out of the formula, and `x` is all that holds none. A linear whose neurons
    are read otherwise is `spoilt`, with the reason: others of the same forward may still make an MLP.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.pairs: list[Pair] = []
        self.calls: Counter[str] = Counter()
        self.spoilt: dict[str, str] = {}
        self.between: dict[str, tuple[str, ...]] = {}

    def found(self) -> Pair:
        """The one pair that there is. Raises `NotOne`, and `Untraceable`."""
        self.read()
        if self.pairs and _RETURNED in self.spoilt.values():  # linears in a row: whose neurons these are is not clear
            raise NotOne(_RETURNED)
        read = Counter(first for pair in self.pairs for first in pair.first)
        once = [p for p in self.pairs if all(self.calls[name] == 1 for name in (*p.first, p.second))]
        whole = [p for p in once if all(name not in self.spoilt and read[name] == 1 for name in p.first)]
        if len(whole) > 1:
            raise NotOne(f"it holds {len(whole)} of them side by side")
        if not whole:
            several = "its hidden neurons are read otherwise than by one linear"
            none = several if self.pairs else "no linear reads what another one and an activation made"
            raise NotOne(next(iter(self.spoilt.values()), none))
        return self._inside(whole[0])

    def _inside(self, pair: Pair) -> Pair:
        """The pair with the linears that its children are or hold, and what stands between them."""
        first = [linear_in(self.module.get_submodule(name)) for name in pair.first]
        second = linear_in(self.module.get_submodule(pair.second))
        assert second is not None
        between = [
            join(name, layer) for name, found in zip(pair.first, first, strict=True) if found for layer in found[1]
        ]
        between += [layer for name in pair.first for layer in self.between.get(name, ())]
        names = tuple(_within(name, found[0]) for name, found in zip(pair.first, first, strict=True) if found)
        return Pair(names, _within(pair.second, second[0]), pair.packed, tuple(between))

    def input(self, node: fx.Node, first: bool) -> str:
        return "x"

    def call(self, node: fx.Node, args: list[str]) -> str:
        name, hidden = str(node.target), self._hidden(node)
        child = self.module.get_submodule(name)
        if linear_in(child) is not None:
            self.calls[name] += 1
            if not hidden:
                return f"{name}(x)"
            whole, gated, packed = (form.fullmatch(hidden[0]) for form in (_WHOLE, _GATED, _PACKED))
            made = whole or (None if is_map(child) else gated or packed)
            if args != hidden[:1] or made is None:
                self._spoil(hidden, "its hidden neurons are read otherwise than by one linear")
                return f"{name}(x)"
            first = made.groups() if made is gated else made.groups()[:1]
            self.pairs.append(Pair(first, name, made is packed))
            return "x"
        if not hidden:
            return "x"
        if hidden[0].startswith("halves of ") or args != hidden[:1]:
            return self._spoil(hidden, f"its hidden neurons go through {name}")
        if is_channelwise(child) and args == hidden[:1] and (maker := self._map(hidden[0])):
            self.between[maker] = (*self.between.get(maker, ()), name)
            return hidden[0]
        try:
            check_alone(name, child)
        except NotOne as reason:
            return self._spoil(hidden, str(reason))
        return hidden[0]

    def step(self, node: fx.Node, args: list[str]) -> str:
        hidden = self._hidden(node)
        if not hidden:
            return "x"
        if node.op == "output":
            return self._spoil(hidden, _RETURNED)
        made = super().step(node, args)
        if any(form.fullmatch(made) for form in (_HALF, _GATED, _PACKED)):
            return made
        if node.op == "call_function" and node.target in FUNCTIONS and not hidden[0].startswith("halves of "):
            return hidden[0]
        return self._spoil(hidden, f"its hidden neurons go through {getattr(node.target, '__name__', node.target)}")

    def _map(self, hidden: str) -> str:
        """The one child that made hidden neurons, if they are channels of a map; "" otherwise."""
        made = _WHOLE.fullmatch(hidden)
        return made[1] if made and is_map(self.module.get_submodule(made[1])) else ""

    def _spoil(self, hidden: list[str], reason: str) -> str:
        for made in hidden:
            for name in re.findall(_LINEAR, made):
                self.spoilt.setdefault(name, reason)
        return "x"

    def _hidden(self, node: fx.Node) -> list[str]:
        return [value for arg in node.all_input_nodes if (value := self.values[arg]) != "x"]


def _within(name: str, child: str) -> str:
    return join(name, child) if child else name


def check_alone(name: str, module: nn.Module) -> None:
    """Raise `NotOne` unless a module treats every entry of the last dimension alone and all alike."""
    if "norm" in type(module).__name__.lower():
        raise NotOne(
            f"its {name} is a {type(module).__name__} over the hidden neurons, so what it makes of one depends on all"
        )
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise NotOne(f"its {name} ({type(module).__name__}) has weights of its own")
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return
    v = torch.linspace(-3.0, 3.0, 14).reshape(2, 7)
    picked = torch.tensor([5, 0, 3])
    try:
        with torch.no_grad():
            same = torch.allclose(module(v.clone())[:, picked], module(v[:, picked].clone()), rtol=1e-5, atol=1e-6)
    except Exception as error:
        raise NotOne(f"its {name} ({type(module).__name__}) takes no small tensor ({type(error).__name__})") from error
    if not same:
        raise NotOne(f"its {name} ({type(module).__name__}) mixes the hidden neurons")
