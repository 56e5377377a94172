"""Models by their timm name, with weights from a file: made once, remembered so that they can be made again."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.words import one_line, some

_NOT_ARCHITECTURE = {"cache_dir", "device", "dtype"}  # where and in what, not which model
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys training scripts store weights under


def create_model(
    name: str, *, checkpoint: str | os.PathLike[str] | None = None, pretrained: bool = False, **args: Any
) -> nn.Module:
    """Make the timm model `name` in eval mode, with weights from `checkpoint` where one is given.

    `args` go to `timm.create_model` (num_classes, img_size, depth, ...); name and args are kept in
    `model.vitlr_origin`. A checkpoint is a safetensors file or one that `torch.load(weights_only=True)` reads: no
    pickled code ever runs. Raises `InputError` for an unknown name (with close matches), arguments the model does not
    take, and a file that does not fit (naming what is missing, unexpected or of another shape).
    """
    import timm

    _check_name(name)
    if "checkpoint_path" in args:
        raise InputError("checkpoint_path= is timm's name for it; pass checkpoint= instead")
    args = {key: value for key, value in args.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained, **args)
    except Exception as cause:  # timm's constructors and downloads raise whatever they like
        what = "download the weights of" if pretrained else "make"
        hint = "; use checkpoint= to read weights from a file" if pretrained else ""
        given = f" with {', '.join(f'{k}={v!r}' for k, v in args.items())}" if args else ""
        raise InputError(f"could not {what} {name}{given}: {one_line(cause)}{hint}") from cause
    if checkpoint is not None:
        load_weights(model, checkpoint, name=name)
    kept = {key: value for key, value in args.items() if key not in _NOT_ARCHITECTURE}
    model.vitlr_origin = {"library": "timm", "name": name, "args": kept}  # type: ignore[assignment]
    return model.eval()


def origin(model: nn.Module) -> dict[str, Any] | None:
    """What `create_model` was called with, as {library, name, args}; None for a model made elsewhere."""
    found = getattr(model, "vitlr_origin", None)
    return found if isinstance(found, dict) else None


def load_weights(model: nn.Module, checkpoint: str | os.PathLike[str], *, name: str | None = None) -> None:
    """Copy the weights of a checkpoint file into `model`, all of them or none; `InputError` where they do not fit."""
    path = Path(checkpoint)
    weights = read_weights(path)
    problem = _mismatch(model, weights)
    if problem:
        renamed = _original_names(model, weights)
        if renamed is None or _mismatch(model, renamed):
            what = name or type(model).__name__
            raise InputError(
                f"checkpoint {path} does not fit {what}: {problem}; name the model that the file was made for, "
                "with its arguments (num_classes=, img_size=, ...)"
            )
        weights = renamed
    model.load_state_dict(dict(weights), strict=True)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, without pickle; wrappers of training scripts are taken off."""
    from timm.models import clean_state_dict

    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device has no end
        raise InputError(f"cannot read checkpoint {path}: it is no regular file; check the path")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # 8 bytes of length, then JSON
    except OSError as cause:
        raise InputError(f"cannot read checkpoint {path}: {cause.strerror or cause}; check the path") from cause
    found = _read_safetensors(path) if is_safetensors else _read_torch(path)
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(f"checkpoint {path} holds no weights: expected names and tensors (a state_dict)")
    return clean_state_dict(dict(found))


def _check_name(name: str) -> None:
    import timm

    if "/" in name or "\\" in name or ":" in name:
        raise InputError(f"unknown model {name!r}: expected a timm name such as vit_tiny_patch16_224; pass files apart")
    if timm.is_model(name):
        return
    base = name.split(".", 1)[0]
    close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
    raise InputError(f"unknown model {name!r}; {hint}")


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
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training scripts store their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged or foreign file makes the unpickler raise almost anything
        raise InputError(
            f"checkpoint {path} is neither safetensors nor a torch file of plain tensors "
            f"(pickled objects are refused): {one_line(cause)}"
        ) from cause


def _mismatch(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What keeps `weights` from filling `model`, in words; empty where they fit."""
    expected = model.state_dict()
    shapes = [
        f"{name} {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names)


def _original_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """`weights` under timm's names, by the model file's own filter; None where that cannot make them fit.

    Published files keep their authors' names or buffers timm no longer stores. Filters also resample position tables
    of another image size without a word, so a file that disagrees in a shape is not given to them.
    """
    expected = model.state_dict()
    if any(name in weights and weights[name].shape != tensor.shape for name, tensor in expected.items()):
        return None
    rename = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        return {name: t for name, t in rename(dict(weights), model).items() if isinstance(t, Tensor)}
    except Exception:  # the filter knows some layouts only; the caller reports what is wrong with this one
        return None
