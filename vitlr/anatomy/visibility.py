"""Linears that a model reads past as it stands, and weights that are none but could be: made modules, exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

from vitlr.anatomy import timm
from vitlr.nn import MultiheadLinears, PointwiseConv, WindowLinears
from vitlr.runtime.modules import join, swap, uncompiled

P = ParamSpec("P")
R = TypeVar("R")

_OPENED = (MultiheadLinears, PointwiseConv, WindowLinears)
_NESTED = "vitlr_use_nested_tensor"  # on an encoder of torch's: what it said before its attentions were opened


def bypassed(model: nn.Module) -> dict[str, nn.Module]:
    """Return timm's linears that the model reads past as it stands and that `visible` or `make_visible` brings back."""
    return {
        join(name, "qkv"): attention.get_submodule("qkv")
        for name, attention in timm.switchable(model)
        if not getattr(attention, timm.SWITCH)
    }


@contextmanager
def visible(model: nn.Module, *, keep: bool = False) -> Iterator[tuple[str, ...]]:
    """Make such linears visible within the block, then put everything back; yield the names of those made visible.

    With `keep` they stay so, unless an error leaves the block.
    timm's `F.linear(x, W, b)` becomes `qkv(x) + b`: the same function, rounded once more where BLAS adds the bias
    before it rounds. At most, on logits of BEiT-B, EVA-giant and SwinV2-B: 7e-16 in fp64, 3e-7 in fp32, 8e-3 in bf16.
    An `nn.MultiheadAttention` becomes `MultiheadLinears`, a 1x1 convolution `PointwiseConv`, torchvision's attention
    in windows `WindowLinears`, on the same numbers.
    """
    switched = [attention for _, attention in timm.switchable(model) if not getattr(attention, timm.SWITCH)]
    before = {id(module) for module in model.modules()}
    names = make_visible(model)
    done = False
    try:
        yield names
        done = True
    finally:
        if not (done and keep):
            for attention in switched:
                setattr(attention, timm.SWITCH, False)
            _put_back(model, [module for module in model.modules() if id(module) not in before])


def seeing(function: Callable[Concatenate[nn.Module, P], R]) -> Callable[Concatenate[nn.Module, P], R]:
    """A function of a model, or of a compiled one, that runs while all of it is visible."""

    @functools.wraps(function)
    def run(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        model = uncompiled(model)
        with visible(model):
            return function(model, *args, **kwargs)

    return run


def make_visible(model: nn.Module) -> tuple[str, ...]:
    """Make such linears visible for good; return the names of the linears this changed, () the second time."""
    names = list(bypassed(model))
    for _, attention in timm.switchable(model):
        setattr(attention, timm.SWITCH, True)
    for name, module in list(model.named_modules()):
        for kind in _OPENED:
            if name and kind.why_not(module) is None:
                swap(model, name, kind.from_dense(module))
                names += [join(name, child) for child in kind.inside]
    for encoder in model.modules():  # what it nests, only torch's own layers can read
        if isinstance(encoder, nn.TransformerEncoder) and _opened(encoder) and not hasattr(encoder, _NESTED):
            setattr(encoder, _NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False
    return tuple(names)


def put_back(model: nn.Module) -> None:
    """Give back what was opened where its linears, and those of its encoder layer, are as they were."""
    _put_back(model, list(model.modules()))


def _put_back(model: nn.Module, among: Collection[nn.Module]) -> None:
    wanted = {id(module) for module in among if isinstance(module, _OPENED) and module.plain}
    wanted -= {id(layer.self_attn) for layer in model.modules() if _replaced(layer)}
    for name, module in list(model.named_modules()):
        if isinstance(module, _OPENED) and id(module) in wanted and name:
            swap(model, name, module.to_dense())
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and hasattr(encoder, _NESTED) and not _opened(encoder):
            encoder.use_nested_tensor = getattr(encoder, _NESTED)
            delattr(encoder, _NESTED)


def _replaced(module: nn.Module) -> bool:
    """Whether it is an encoder layer of torch's that would read past something in the place of its linears."""
    return isinstance(module, nn.TransformerEncoderLayer) and {type(module.linear1), type(module.linear2)} != {
        nn.Linear
    }


def _opened(model: nn.Module) -> bool:
    return any(isinstance(module, MultiheadLinears) for module in model.modules())
