"""The state dicts of a weight file: safetensors, or what `torch.load(weights_only=True)` reads of training scripts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitlr.errors import InputError
from vitlr.runtime.words import one_line, some

_DEEPEST = 4  # tables in tables: {"model_ema": {"module": {...}}} has two


def state_dicts(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Read every state dict of a safetensors or torch file by the keys that lead to it, without pickle.

    A plain one is under "", the second of `{"student": ..., "ema": {"module": ...}}` under "ema.module". Numbers and
    texts beside the tensors of a state dict are left out, as are tables by numbers (an optimizer's). Raises
    `InputError` for a file that cannot be read or holds none.
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
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
    if tensors:
        from timm.models import clean_state_dict

        yield ".".join(keys), clean_state_dict(tensors)
    for key, value in content.items():
        yield from _inside(value, (*keys, key), seen)


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
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged or foreign file makes the unpickler raise almost anything
        raise InputError(
            f"checkpoint {path} is neither safetensors nor a torch file of plain tensors "
            f"(pickled objects are refused): {one_line(cause)}"
        ) from cause


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
# timm's training scripts store their arguments, others the best accuracy as a number of NumPy.
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in _KINDS)]
_PLAIN += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
