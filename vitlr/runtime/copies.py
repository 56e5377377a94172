"""Copies of a model that run their own modules, or are refused."""

from __future__ import annotations

import copy
import dis
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.words import one_line


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy of a model; activations that its modules keep are copied without their graph.

    A function that was put on a module by hand and that closes over one (a wrapper around a forward, a hook,
    `torch.compile(model.forward)`) is copied as it is and would run the original. Raises `InputError` for that, and for
    what cannot be copied.
    """
    kept = {id(t): t.detach().clone() for module in model.modules() for t in _graphs(vars(module))}
    try:
        twin = copy.deepcopy(model, dict(kept))  # a memo: what it holds is not copied again
    except Exception as cause:  # whatever a module keeps may refuse to be copied
        raise InputError(f"the model cannot be copied ({one_line(cause, 120)}); {_REMEDY}") from cause
    originals = {id(module) for module in model.modules()}
    for name, module in twin.named_modules():
        for key, value in vars(module).items():
            if key not in _HARMLESS and any(id(found) in originals for found in _reached(value)):
                raise InputError(
                    f"{name or type(model).__qualname__}.{key} was put there by hand and holds on to this very model: "
                    f"a copy would run the original, not what is compressed; {_REMEDY}"
                )
    return twin


_HARMLESS = ("extra_repr",)  # never run; torchao puts one on every linear
_REMEDY = "take that off first and put it on the result (compile afterwards), or pass inplace=True"


@contextmanager
def no_graphs_left(model: nn.Module) -> Iterator[None]:
    """Detach activations that modules have kept once the block is over: a graph holds memory and defies copying."""
    try:
        yield
    finally:
        for module in model.modules():
            state = vars(module)
            for key, value in list(state.items()):
                if key not in _REGISTERED:
                    state[key] = _detached(value)


_REGISTERED = ("_parameters", "_buffers", "_modules")


def _graphs(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors with a graph in a value and in the containers in it."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif depth:
        for item in _held(value):
            yield from _graphs(item, depth - 1)


def _held(value: Any) -> list[Any]:
    """What a container, or an object of no special kind, holds."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return list(value)
    return list(vars(value).values()) if _plain(value) else []


def _plain(value: Any) -> bool:
    """Whether a value is an object whose attributes are all that it is, and no module, class or function."""
    special = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, Tensor)
    return hasattr(value, "__dict__") and not isinstance(value, special)


def _detached(value: Any) -> Any:
    """The value with its tensors detached; containers are changed in place where they can be."""
    if not any(True for _ in _graphs(value)):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict) or _plain(value):
        state = value if isinstance(value, dict) else vars(value)
        state.update({key: _detached(item) for key, item in state.items()})
        return value
    if isinstance(value, (list, set, deque)):
        items = [_detached(item) for item in value]
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(items)
        return value
    items = [_detached(item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _reached(value: Any) -> Iterator[nn.Module]:
    """The modules that a function can call: bound, closed over, among its defaults or the globals that it names."""
    queue: deque[Any] = deque([value])  # the nearest first
    seen: set[int] = set()
    while queue and len(seen) < 10_000:
        found = queue.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, nn.Module):
            yield found
        elif isinstance(found, types.MethodType):
            queue += [found.__self__, found.__func__]
        elif isinstance(found, functools.partial):
            queue += [found.func, *found.args, *found.keywords.values()]
        elif isinstance(found, types.FunctionType):
            queue += [cell.cell_contents for cell in found.__closure__ or () if _filled(cell)]
            queue += [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values(), *vars(found).values()]
            queue += [found.__globals__[name] for name in _globals_of(found.__code__) if name in found.__globals__]
        elif isinstance(found, weakref.ref):
            queue.append(found())
        elif _plain(found) or isinstance(found, (dict, list, tuple, set, deque)):  # also of hooks, also behind a cache
            queue += _held(found)[:100]


def _globals_of(code: types.CodeType) -> list[str]:
    """The globals that a function reads; `co_names` has attributes as well."""
    return [str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
