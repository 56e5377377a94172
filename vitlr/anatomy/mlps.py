"""Which modules are MLPs with hidden neurons that can be removed, and where the weights of neuron j lie.

Hidden neuron j is row j of the first linear (rows j of gate and value in a gated MLP) and column j of the second.
It can go without changing the others where everything between the linears treats each neuron alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vitlr.anatomy import linears
from vitlr.errors import InputError
from vitlr.nn import (
    Fp8Linear,
    Int8Linear,
    LowRankGLU,
    LowRankLinear,
    QuantizedLinear,
    ResidualLowRankLinear,
    SelectedLinear,
)
from vitlr.nn._formula import Formula, Untraceable
from vitlr.nn._fused import original_of
from vitlr.nn._fused_mlp import FusedMlp

SUPPORTED = (
    "timm's Mlp, GluMlp, SwiGLU and SwiGLUPacked, and others of the form fc2(act(fc1(x))) or fc2(act(g(x)) * v(x))"
)
_MARK = "vitlr_full_width"  # on an MLP that was narrowed: the width it had before anything was removed
_BYTES = (QuantizedLinear, Int8Linear, Fp8Linear)
_LINEARS = (nn.Linear, LowRankLinear, ResidualLowRankLinear, SelectedLinear, *_BYTES)
_LOOKS_LIKE_ONE = re.compile(r"mlp|ffn|feed_?forward|swiglu", re.IGNORECASE)
_FUNCTIONS = {F.gelu, F.silu, F.relu, F.sigmoid, F.tanh, F.hardswish, F.dropout, torch.relu, torch.sigmoid, torch.tanh}


@dataclass(frozen=True)
class Mlp:
    """An MLP `fc2(h)` with `h = act(fc1(x))` or `act(gate(x)) * value(x)`, `h [D]`, by the names of its linears.

    `first` and `second` are relative to the module called `name`. In a `packed` one the single first linear has 2 D
    rows: neuron j is rows j and D + j.
    """

    name: str
    module: nn.Module
    first: tuple[str, ...]
    second: str
    packed: bool = False

    @property
    def fc1(self) -> tuple[nn.Module, ...]:
        """The first linears, dense or low-rank: one, or gate and value."""
        return tuple(self.module.get_submodule(name) for name in self.first)

    @property
    def fc2(self) -> nn.Module:
        """The second linear, dense or low-rank."""
        return self.module.get_submodule(self.second)

    @property
    def width(self) -> int:
        """D, the number of hidden neurons."""
        return int(self.fc2.in_features)  # type: ignore[arg-type]

    @property
    def full_width(self) -> int:
        """The width before anything was removed."""
        return int(getattr(self._owner, _MARK, self.width))

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all its linears in the model, the second one last."""
        return tuple(f"{self.name}.{child}" if self.name else child for child in (*self.first, self.second))

    @property
    def _owner(self) -> nn.Module:
        # A fused MLP gives its original back when it is unfused, and the mark with it.
        return original_of(self.module)

    def rows(self, keep: Tensor) -> Tensor:
        """The rows of a first linear that belong to the neurons `keep`."""
        return torch.cat([keep, keep + self.width]) if self.packed else keep

    def mark(self, full_width: int) -> None:
        """Remember the width before anything was removed."""
        setattr(self._owner, _MARK, full_width)

    def unmark(self) -> None:
        """Forget it: nothing is missing."""
        vars(self._owner).pop(_MARK, None)


def find_mlps(model: nn.Module) -> dict[str, Mlp]:
    """The MLPs whose hidden neurons can be removed, by name, in module order; `refused_mlps` says what is left out."""
    return _survey(model)[0]


def refused_mlps(model: nn.Module) -> dict[str, str]:
    """What looks like an MLP but keeps its width, each with the reason."""
    return _survey(model)[1]


def narrowed_mlps(model: nn.Module) -> dict[str, Mlp]:
    """The MLPs that were narrowed (`vitlr.pruning.narrow_mlp`), by name."""
    marked = ((name, module) for name, module in model.named_modules() if hasattr(original_of(module), _MARK))
    return {name: read_mlp(module, name) for name, module in marked}


def read_mlp(module: nn.Module, name: str = "") -> Mlp:
    """Read one module as an MLP. Raises `InputError` with the reason where its neurons cannot be removed one by one."""
    if isinstance(module, FusedMlp):
        first = module.kept[:-2]  # before act and fc2
        return Mlp(name, module, first, "fc2", isinstance(module, LowRankGLU) and len(first) == 1)
    try:
        return _read_pair(module, name) or _read_forward(module, name)
    except _NotOne as reason:
        what = f"{name} ({type(module).__qualname__})" if name else type(module).__qualname__
        raise InputError(f"{what} keeps its width: {reason}. Supported: {SUPPORTED}") from None


class _NotOne(Exception):
    """Why a module is no MLP whose neurons stand each for itself."""


def _survey(model: nn.Module) -> tuple[dict[str, Mlp], dict[str, str]]:
    surface = linears.survey(model)
    found: dict[str, Mlp] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        fused = isinstance(module, FusedMlp)
        if not fused and not _has_pair(module) and sum(isinstance(m, _LINEARS) for m in module.children()) < 2:
            if _named_like_one(name, module) and any(isinstance(m, nn.Conv2d) for m in module.children()):
                refused[name] = "its layers are convolutions, not linears"
            continue
        try:
            mlp = read_mlp(module, name)
        except InputError as reason:
            if _named_like_one(name, module):
                refused[name] = str(reason)
            continue
        inside = {child: model.get_submodule(child) for child in mlp.linears}
        selected = [child for child, linear in inside.items() if isinstance(linear, SelectedLinear)]
        if selected:
            refused[name] = f"channels were taken out of {selected[0]} already"
            continue
        integers = [child for child, linear in inside.items() if isinstance(linear, _BYTES)]
        if integers:
            refused[name] = f"the weights of {integers[0]} are integers already"
            continue
        dense = [child for child, linear in inside.items() if isinstance(linear, nn.Linear)]
        outside = [child for child in dense if child not in surface.targets]
        if not outside:
            found[name] = mlp
        elif outside[0] in surface.hidden:
            refused[name] = f"{outside[0]}: {surface.hidden[outside[0]].reason}"
    return found, refused


def _named_like_one(name: str, module: nn.Module) -> bool:
    return bool(_LOOKS_LIKE_ONE.search(name.rpartition(".")[2]) or _LOOKS_LIKE_ONE.search(type(module).__qualname__))


def _has_pair(module: nn.Module) -> bool:
    """Whether a block holds its MLP as transformers writes it: `intermediate` (dense, activation) and `output`."""
    first, second = (getattr(module, child, None) for child in ("intermediate", "output"))
    return isinstance(getattr(first, "dense", None), _LINEARS) and isinstance(getattr(second, "dense", None), _LINEARS)


def _read_pair(module: nn.Module, name: str) -> Mlp | None:
    if not _has_pair(module):
        return None
    act = module.get_submodule("intermediate")._modules.get("intermediate_act_fn")
    if act is None:
        raise _NotOne("its intermediate has no activation that could be looked at")
    _check_alone("intermediate.intermediate_act_fn", act)
    return _sized(Mlp(name, module, ("intermediate.dense",), "output.dense"))


_LINEAR = r"([^ ()]+)\(x\)"
_WHOLE = re.compile(_LINEAR)
_HALF = re.compile(rf"halves of {_LINEAR}|{_LINEAR}\[[01]\]")
_GATED = re.compile(rf"{_LINEAR} \* (?!\1\(){_LINEAR}")
_PACKED = re.compile(rf"{_LINEAR}\[([01])\] \* \1\(x\)\[(?!\2)[01]\]")


class _Hidden(Formula):
    """Follows the hidden neurons from the first linears to the second: `fc1(x)`, `fc1(x)[0] * fc1(x)[1]`.

    What treats every neuron alone is left out of the formula, and `x` is all that holds none.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.name = name
        self.found: Mlp | None = None

    def input(self, node: fx.Node, first: bool) -> str:
        return "x"

    def call(self, node: fx.Node, args: list[str]) -> str:
        name, hidden = str(node.target), self._hidden(node)
        child = self.module.get_submodule(name)
        if isinstance(child, _LINEARS):
            if not hidden:
                return f"{name}(x)"
            whole, gated, packed = (form.fullmatch(hidden[0]) for form in (_WHOLE, _GATED, _PACKED))
            made = whole or gated or packed
            if self.found is not None or args != hidden[:1] or made is None:
                raise _NotOne("its hidden neurons are read otherwise than by one linear")
            first = made.groups() if made is gated else made.groups()[:1]
            self.found = Mlp(self.name, self.module, first, name, made is packed)
            return "x"
        if not hidden:
            return "x"
        if hidden[0].startswith("halves of "):
            raise _NotOne(f"its hidden neurons go through {name}")
        _check_alone(name, child)
        return hidden[0]

    def step(self, node: fx.Node, args: list[str]) -> str:
        hidden = self._hidden(node)
        if not hidden:
            return "x"
        if node.op == "output":
            raise _NotOne("its hidden neurons are part of what it returns")
        made = super().step(node, args)
        if any(form.fullmatch(made) for form in (_HALF, _GATED, _PACKED)):
            return made
        if node.op == "call_function" and node.target in _FUNCTIONS and not hidden[0].startswith("halves of "):
            return hidden[0]
        raise _NotOne(f"its hidden neurons go through {getattr(node.target, '__name__', node.target)}")

    def _hidden(self, node: fx.Node) -> list[str]:
        return [value for arg in node.all_input_nodes if (value := self.values[arg]) != "x"]


def _read_forward(module: nn.Module, name: str) -> Mlp:
    """The MLP that a module's forward is, on any device, unrun."""
    hidden = _Hidden(module, name)
    try:
        hidden.read()
    except Untraceable as reason:
        raise _NotOne(str(reason)) from reason
    if hidden.found is None:
        raise _NotOne("no linear reads what another one and an activation made")
    return _sized(hidden.found)


def _check_alone(name: str, module: nn.Module) -> None:
    """Raise `_NotOne` unless a module treats every entry of the last dimension alone and all alike."""
    if "norm" in type(module).__name__.lower():
        raise _NotOne(
            f"its {name} is a {type(module).__name__} over the hidden neurons, so what it makes of one depends on all"
        )
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        raise _NotOne(f"its {name} ({type(module).__name__}) has weights of its own")
    if isinstance(module, (nn.Dropout, nn.Identity)):
        return
    v = torch.linspace(-3.0, 3.0, 14).reshape(2, 7)
    picked = torch.tensor([5, 0, 3])
    try:
        with torch.no_grad():
            same = torch.allclose(module(v.clone())[:, picked], module(v[:, picked].clone()), rtol=1e-5, atol=1e-6)
    except Exception as error:
        raise _NotOne(f"its {name} ({type(module).__name__}) takes no small tensor ({type(error).__name__})") from error
    if not same:
        raise _NotOne(f"its {name} ({type(module).__name__}) mixes the hidden neurons")


def _sized(mlp: Mlp) -> Mlp:
    """The MLP, if the sizes of its linears go together."""
    rows = mlp.width * (2 if mlp.packed else 1)
    sizes = [int(linear.out_features) for linear in mlp.fc1]  # type: ignore[arg-type]
    if any(size != rows for size in sizes):
        raise _NotOne(f"its linears do not fit: {sizes} rows before {mlp.width} columns")
    return mlp
