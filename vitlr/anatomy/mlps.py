"""Which modules are MLPs with hidden neurons that can be removed, and where the weights of neuron j lie.

Hidden neuron j is row j of the first linear (rows j of gate and value in a gated MLP) and column j of the second.
It can go without changing the others where everything between the linears treats each neuron alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.anatomy import depthwise, linears
from vitlr.anatomy.channelwise import LINEARS, linear_in
from vitlr.anatomy.hidden_neurons import FUNCTIONS, Hidden, NotOne, check_alone
from vitlr.anatomy.visibility import visible
from vitlr.errors import InputError
from vitlr.nn import Fp8Linear, Int8Linear, LowRankGLU, QuantizedLinear, SelectedLinear
from vitlr.nn._formula import Untraceable
from vitlr.nn._fused import original_of
from vitlr.nn._fused_mlp import FusedMlp

SUPPORTED = (
    "timm's Mlp, GluMlp, SwiGLU and SwiGLUPacked, and others of the form fc2(act(fc1(x))) or fc2(act(g(x)) * v(x))"
)
_MARK = "vitlr_full_width"  # on an MLP that was narrowed: the width it had before anything was removed
_BYTES = (QuantizedLinear, Int8Linear, Fp8Linear)
_LOOKS_LIKE_ONE = re.compile(r"mlp|ffn|feed_?forward|swiglu", re.IGNORECASE)


@dataclass(frozen=True)
class Mlp:
    """An MLP `fc2(h)` with `h = act(fc1(x))` or `act(gate(x)) * value(x)`, `h [D]`, by the names of its linears.

    `first` and `second` are relative to the module called `name`. In a `packed` one the single first linear has 2 D
    rows: neuron j is rows j and D + j. `between`: depthwise convolutions and norms by batch whose channel j is neuron
    j's.
    """

    name: str
    module: nn.Module
    first: tuple[str, ...]
    second: str
    packed: bool = False
    between: tuple[str, ...] = ()

    @property
    def fc1(self) -> tuple[nn.Module, ...]:
        """The first linears, dense or low-rank: one, or gate and value."""
        return tuple(self.module.get_submodule(name) for name in self.first)

    @property
    def fc2(self) -> nn.Module:
        """The second linear, dense or low-rank."""
        return self.module.get_submodule(self.second)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """Those between its linears."""
        return tuple(self.module.get_submodule(name) for name in self.between)

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
    """The MLPs that were narrowed (`vitlr.pruning.narrow_mlp`), by name; those of convolutions must be visible."""
    marked = ((name, module) for name, module in model.named_modules() if hasattr(original_of(module), _MARK))
    return {name: read_mlp(module, name) for name, module in marked}


def narrower_mlps(model: nn.Module) -> dict[str, tuple[int, int]]:
    """MLPs that were narrowed, by name: (width now, width before)."""
    with visible(model):
        return {name: (mlp.width, mlp.full_width) for name, mlp in narrowed_mlps(model).items()}


def read_mlp(module: nn.Module, name: str = "") -> Mlp:
    """Read one module as an MLP. Raises `InputError` with the reason where its neurons cannot be removed one by one."""
    if isinstance(module, FusedMlp):
        first = module.kept[:-2]  # before act and fc2
        return Mlp(name, module, first, module.kept[-1], isinstance(module, LowRankGLU) and len(first) == 1)
    try:
        known = (_read_pair, _read_encoder_layer, _read_depthwise)
        return next((mlp for read in known if (mlp := read(module, name)) is not None), None) or _read_forward(
            module, name
        )
    except NotOne as reason:
        what = f"{name} ({type(module).__qualname__})" if name else type(module).__qualname__
        raise InputError(f"{what} keeps its width: {reason}. Supported: {SUPPORTED}") from None


def _survey(model: nn.Module) -> tuple[dict[str, Mlp], dict[str, str]]:
    surface = linears.survey(model)
    found: dict[str, Mlp] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        fused = isinstance(module, FusedMlp)
        if not fused and not _has_pair(module) and sum(linear_in(m) is not None for m in module.children()) < 2:
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
    return isinstance(getattr(first, "dense", None), LINEARS) and isinstance(getattr(second, "dense", None), LINEARS)


def _read_pair(module: nn.Module, name: str) -> Mlp | None:
    if not _has_pair(module):
        return None
    act = module.get_submodule("intermediate")._modules.get("intermediate_act_fn")
    if act is None:
        raise NotOne("its intermediate has no activation that could be looked at")
    check_alone("intermediate.intermediate_act_fn", act)
    return _sized(Mlp(name, module, ("intermediate.dense",), "output.dense"))


def _read_encoder_layer(module: nn.Module, name: str) -> Mlp | None:
    """Torch's own layer, whose forward has too many ways to be traced."""
    if type(module) is not nn.TransformerEncoderLayer:
        return None
    if isinstance(act := module.activation, nn.Module):
        check_alone("activation", act)
    elif act not in FUNCTIONS:
        raise NotOne(f"its hidden neurons go through {getattr(act, '__name__', act)}")
    return _sized(Mlp(name, module, ("linear1",), "linear2"))


def _read_depthwise(module: nn.Module, name: str) -> Mlp | None:
    names = depthwise.parts(module)
    if names is None:
        return None
    for child, other in depthwise.others(module).items():
        check_alone(child, other)
    return _sized(Mlp(name, module, names[:1], names[2], between=names[1:2]))


def _read_forward(module: nn.Module, name: str) -> Mlp:
    """The MLP that a module's forward is, on any device, unrun."""
    try:
        pair = Hidden(module).found()
    except Untraceable as reason:
        raise NotOne(str(reason)) from reason
    return _sized(Mlp(name, module, *pair))


def _sized(mlp: Mlp) -> Mlp:
    """The MLP, if the sizes of its linears go together."""
    rows = mlp.width * (2 if mlp.packed else 1)
    sizes = [int(linear.out_features) for linear in mlp.fc1]  # type: ignore[arg-type]
    if any(size != rows for size in sizes):
        raise NotOne(f"its linears do not fit: {sizes} rows before {mlp.width} columns")
    return mlp
