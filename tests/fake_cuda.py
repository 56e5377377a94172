"""A card that is none: tensors that say they are on CUDA, and refuse what a real card would refuse of the host.

Everything is computed on the CPU. What is moved or made on "cuda" is marked, and what comes of it; an operation on
marked tensors and on others of the host together raises as CUDA does (numbers without dimensions and indices may lie
there), and so does looking at one by NumPy. Gradients as autograd hands them on bear no mark: nothing is known of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
CROSSING = {"copy_", "set_", "__setitem__", "__getitem__", "index", "_has_compatible_shallow_copy_type"}  # may mix


class Card(TorchFunctionMode):
    """Keeps the account of which tensor lies where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return CARD if _on_card(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return _on_card(args[0])
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if func == Tensor.data.__set__:
            args[0]._place = getattr(args[1], "_place", None)
            return func(*args)
        given = list(_tensors((args, kwargs)))
        remote = any(map(_on_card, given))
        if remote and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if remote and name not in CROSSING and name not in ("to", "type_as", "cpu"):
            apart = [list(t.shape) for t in given if _on_host(t) and t.ndim and t.numel()]
            if apart:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {apart} on the cpu")
        target = HOST.type if name == "cpu" else CARD.type if name == "cuda" else _target(name, args, kwargs)
        found = func(*_real(args), **_real(kwargs))
        if name in ("copy_", "__setitem__"):
            return found
        place = target or (CARD.type if remote else HOST.type if all(map(_on_host, given)) else None)
        if place is not None:
            for t in _tensors(found):
                if any(t is other for other in given) and target is not None and _on_card(t) != (place == CARD.type):
                    found = t = t.view_as(t)  # a move makes another tensor
                t._place = place
        return found


def _on_card(tensor: Any) -> bool:
    return getattr(tensor, "_place", None) == CARD.type


def _on_host(tensor: Any) -> bool:
    return getattr(tensor, "_place", None) == HOST.type


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    """The kind of device that is asked for, None where none is."""
    for one in (kwargs.get("device"), args[1] if name in ("to", "type_as") and len(args) > 1 else None):
        if isinstance(one, Tensor):
            return CARD.type if _on_card(one) else HOST.type
        if isinstance(one, (torch.device, str)):
            return torch.device(one).type
    return None


def _real(value: Any) -> Any:
    """The same with devices that there are."""
    if isinstance(value, torch.device):
        return HOST if value.type == CARD.type else value
    if isinstance(value, str) and value.startswith("cuda"):
        return HOST
    if type(value) in (tuple, list):
        return type(value)(map(_real, value))
    return {key: _real(item) for key, item in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def moved(model: nn.Module) -> nn.Module:
    """The model, on the card."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._place = CARD.type
    return model


@contextmanager
def card(monkeypatch: Any) -> Iterator[None]:
    """A process with one card, which has no random numbers of its own."""
    fork, make = torch.random.fork_rng, nn.Parameter.__new__

    def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = make(cls, data, requires_grad)
        if hasattr(data, "_place"):
            made._place = data._place
        return made

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=(), **how: fork(devices=[], **how))
    monkeypatch.setattr(nn.Parameter, "__new__", parameter)
    with Card():
        yield
