"""The state dicts of a weight file: safetensors, or what `torch.load(weights_only=True)` reads of training scripts."""

from __future__ import annotations

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitlr.errors import InputError
from vitlr.runtime.words import one_line, some

_POINT = re.compile(r"(?:WeightsUnpickler error: |from a trusted source\.\s+)(\S.*?)\s*(?:Check the doc|$)", re.DOTALL)
_DEEPEST = 4  # tables in tables: {"model_ema": {"module": {...}}} has two


def state_dicts(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Read every state dict of a safetensors or torch file by the keys that lead to it, without pickle.

    A plain one is under "", the second of `{"student": ..., "ema": {"module": ...}}` under "ema.module". Numbers and
    texts beside the tensors of a state dict are left out, as are tables by numbers (an optimizer's). Of objects, what
    they hold is read, and no code of theirs is run; so is a model that was pickled as a whole. Raises `InputError` for
    a file that cannot be read or holds none.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise InputError(f"cannot read checkpoint {path}: it is no regular file; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as cause:
        raise InputError(f"cannot read checkpoint {path}: {cause.strerror or cause}; check the path") from cause
    if start.startswith(b"PK") and path.suffix == ".npz":
        raise InputError(
            f"checkpoint {path} holds arrays under the names of JAX; write it as safetensors first: "
            "timm's model.load_pretrained(path) reads it, safetensors.torch.save_file(model.state_dict(), F) writes it"
        )
    content = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)  # 8 bytes of length, then JSON
    found = dict(_inside(content, (), set()))
    if not found:
        keys = f", got {some([str(key) for key in content])}" if isinstance(content, Mapping) and content else ""
        raise InputError(
            f"checkpoint {path} holds no weights: expected names and tensors (a state_dict), alone or under a key of a "
            f"training script{keys}"
        )
    return found


def _inside(content: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tables that hold tensors under names, from the outside in; `seen`, since tables may hold themselves."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if id(content) in seen or len(keys) > _DEEPEST:
        return
    seen.add(id(content))
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)} or _of_module(content, "", set())
    if tensors:
        yield ".".join(keys), tensors
    for key, value in content.items():
        yield from _inside(value, (*keys, key), seen)


def _of_module(content: Any, prefix: str, above: set[int]) -> dict[str, Tensor]:
    """The state dict of a module that was pickled as a whole, by what nn.Module keeps where."""
    held = getattr(content, "__dict__", {})
    if not {"_parameters", "_buffers", "_modules"} <= held.keys() or id(content) in above:
        return {}
    own = {**held["_parameters"], **held["_buffers"]}
    left = held.get("_non_persistent_buffers_set") or ()
    state = {f"{prefix}{name}": t for name, t in own.items() if isinstance(t, Tensor) and name not in left}
    for name, child in held["_modules"].items():
        state |= _of_module(child, f"{prefix}{name}.", above | {id(content)})
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if "vitlr" in (file.metadata() or {}):
                raise InputError(f"{path} was written by vitlr; open it with vitlr.load, it needs no model name")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as cause:
        raise InputError(f"checkpoint {path} is not a whole safetensors file ({one_line(cause)})") from cause


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_unread(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged or foreign file makes the unpickler raise almost anything
        point = _POINT.search(str(cause))  # torch's messages come to it late
        said = one_line(cause) if point is None else one_line(Exception(point[1]))
        raise InputError(
            f"checkpoint {path} is neither safetensors nor a torch file of tensors and plain objects (no pickled code "
            f"is run); write model.state_dict() alone: {said}"
        ) from cause


class _Unread:
    """Stands for every class and function that a pickle names: none is looked up or run, what they held is a table."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


class _Array:
    """Stands for what NumPy wrote, whose states are no tables."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _unread(path: Path) -> list[Any]:
    """Stand-ins for what a torch file names beside plain values: a script's options, callbacks, or the whole model."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return [(_Array if name.startswith("numpy.") else _Unread, name) for name in names]
    except Exception:  # an old file, or none: reading it says what is wrong
        return _PLAIN


def _number(dtype: np.dtype[Any], content: bytes) -> Any:
    """A scalar of NumPy, as pickles hold it; of numbers only, since other kinds hold objects."""
    if dtype.kind not in "biufc":
        raise TypeError(f"a scalar of {dtype} is no number")
    return np.frombuffer(content, dtype)[0]


_KINDS = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)
# Of old files, which do not say what they name: timm's scripts store their arguments, others numbers of NumPy.
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in _KINDS)]
_PLAIN += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
