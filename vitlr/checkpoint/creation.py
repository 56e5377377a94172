"""Models by their timm name, with weights from a file: made once, remembered so that they can be made again."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitlr.anatomy.linears import classifier_names
from vitlr.checkpoint import folders, other_libraries
from vitlr.errors import InputError
from vitlr.runtime.words import one_line, some

_logger = logging.getLogger(__name__)
_NOT_ARCHITECTURE = {"cache_dir", "device", "dtype"}  # where and in what, not which model
_WRAPPERS = ("state_dict_ema", "model_ema", "model_state_dict", "state_dict", "model")  # of training scripts
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "base_model.", "student.")


def create_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    new_head: bool = False,
    **args: Any,
) -> nn.Module:
    """Make the timm model `name` in eval mode, with weights from `checkpoint` where one is given.

    `name` may also be `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, which bring their weights, from the Hub safetensors
    only. `args` go to `timm.create_model` (num_classes, img_size, depth, ...); name and args are kept in
    `model.vitlr_origin`, the repository that pretrained weights are of in `model.vitlr_base`. A checkpoint is a
    safetensors file or one that `torch.load(weights_only=True)` reads: no pickled code ever runs. Raises `InputError`
    for an unknown name (with close matches), a folder that is not there, arguments the model does not take, and a file
    that does not fit (naming what is missing, unexpected or of another shape). `new_head=True` takes it for another
    task all the same: the classifier may be new, and positions are resampled to the image size.
    """
    import timm

    elsewhere, called = folders.is_folder_name(name), name
    if elsewhere:
        bare = checkpoint is not None or name.startswith(folders.LOCAL)  # whose weights may be of any plain kind
        files = (folders.CONFIG,) if bare else (folders.CONFIG, folders.WEIGHTS)
        name = f"{folders.LOCAL}{folders.folder(name, *files)}"
    else:
        _check_name(name)
    if "checkpoint_path" in args:
        raise InputError("checkpoint_path= is timm's name for it; pass checkpoint= instead")
    args = {key: value for key, value in args.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=pretrained or (elsewhere and checkpoint is None), **args)
    except Exception as cause:  # timm's constructors and downloads raise whatever they like
        what = "download the weights of" if pretrained and not elsewhere else "make"
        hint = "; use checkpoint= to read weights from a file" if pretrained else ""
        if elsewhere and folders.is_ours(called):
            hint = "; it was written by vitlr: open it with vitlr.load"
        given = f" with {', '.join(f'{k}={v!r}' for k, v in args.items())}" if args else ""
        raise InputError(f"could not {what} {called}{given}: {one_line(cause)}{hint}") from cause
    if checkpoint is not None:
        load_weights(model, checkpoint, name=name, new_head=new_head)
    kept = {key: value for key, value in args.items() if key not in _NOT_ARCHITECTURE}
    if elsewhere:  # a file names timm's architecture, with what its config says on top
        name, told = _config_in(name.removeprefix(folders.LOCAL))
        kept = {"num_classes": model.num_classes, **told, **kept}
    if checkpoint is None:
        model.vitlr_base = _repository(model, called, pretrained)  # type: ignore[assignment]
    model.vitlr_origin = {"library": "timm", "name": name, "args": kept}  # type: ignore[assignment]
    return model.eval()


def _config_in(folder: str) -> tuple[str, dict[str, Any]]:
    """The architecture that a folder is of, and its arguments there."""
    from timm.models import _hub

    _, architecture, args = _hub.load_model_config_from_path(folder)
    return architecture, dict(args or {})


def _repository(model: nn.Module, name: str, pretrained: bool) -> str | None:
    """The repository on the Hub that the weights are of; None where they are of none, or nobody knows."""
    if folders.is_folder_name(name):
        return name.removeprefix(folders.HUB).partition("@")[0] if name.startswith(folders.HUB) else None
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    found, tag = config.get("hf_hub_id"), config.get("tag")
    if not pretrained or not isinstance(found, str):
        return None
    return found + config["architecture"] + (f".{tag}" if tag else "") if found.endswith("/") else found


def origin(model: nn.Module) -> dict[str, Any] | None:
    """What made the model, as {library, name, args}: `create_model`, or the file it came from; None for others."""
    found = getattr(model, "vitlr_origin", None)
    return found if isinstance(found, dict) else None


def remade(model: nn.Module) -> nn.Module | None:
    """The dense model that it came from, with random weights; None where that is not known."""
    found = origin(model)
    if found is None:
        return None
    if found["library"] != "timm":
        return other_libraries.build(other_libraries.check(found)).eval()
    return create_model(found["name"], **found["args"])


def load_weights(
    model: nn.Module, checkpoint: str | os.PathLike[str], *, name: str | None = None, new_head: bool = False
) -> None:
    """Copy the weights of a checkpoint file into `model`, all of them or none; `InputError` where they do not fit.

    With `new_head` the model is for another task, as timm does it: a classifier that the file lacks or has in another
    shape is left as it was made, with random weights, and positions of another image size are resampled, both with a
    warning. A model of timm that was made without a classifier (`num_classes=0`) takes none.
    """
    path = Path(checkpoint)
    weights: Mapping[str, Tensor] = _inner(model, read_weights(path))
    weights = _without_lost_head(model, weights)
    if new_head:
        weights = _resampled(model, _with_new_head(model, weights, path), path)
    problem = _mismatch(model, weights)
    if problem:
        renamed = _fitting(model, weights)
        if renamed is None:
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
            start = file.read(9)
    except OSError as cause:
        raise InputError(f"cannot read checkpoint {path}: {cause.strerror or cause}; check the path") from cause
    if start.startswith(b"PK") and path.suffix == ".npz":
        raise InputError(
            f"checkpoint {path} holds arrays under the names of JAX; write it as safetensors first: "
            "timm's model.load_pretrained(path) reads it, safetensors.torch.save_file(model.state_dict(), F) writes it"
        )
    found = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path)  # 8 bytes of length, then JSON
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        keys = f", got {some([str(key) for key in found])}" if isinstance(found, Mapping) and found else ""
        raise InputError(
            f"checkpoint {path} holds no weights: expected names and tensors (a state_dict), alone or as one of "
            f"{', '.join(_WRAPPERS)}{keys}"
        )
    return clean_state_dict(dict(found))


def _check_name(name: str) -> None:
    import timm

    if "/" in name or "\\" in name or ":" in name:
        raise InputError(
            f"unknown model {name!r}: expected a timm name such as vit_tiny_patch16_224, hf-hub:OWNER/NAME or "
            "local-dir:FOLDER; pass files apart"
        )
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


def _fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """`weights`, or those under the names of timm, if they fit."""
    for form in (weights, _original_names(model, weights)):
        if form is not None and not _mismatch(model, form):
            return form
    return None


def _inner(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What of `weights` stands under prefixes of training scripts; losses and metrics beside the model are left out."""
    expected = model.state_dict().keys()
    while not any(name in expected for name in weights):
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    return weights


def _with_new_head(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """`weights` with the model's own classifier where the file has none, or one of another shape."""
    own, heads = model.state_dict(), tuple(f"{head}." for head in classifier_names(model))
    if not heads or all(name.startswith(heads) for name in own):
        return weights
    new = {k: t for k, t in own.items() if k.startswith(heads) and (k not in weights or weights[k].shape != t.shape)}
    if new:
        there = any(name in weights for name in new)
        _logger.warning("%s is new: %s has %s", some(sorted(new)), path, "one of another shape" if there else "none")
    return {**weights, **new}


def _resampled(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    """`weights` with positions resampled to the model's image size by timm's filter; as they are where that fails."""
    own = model.state_dict()
    others = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    adapted = _filtered(model, weights) if others else None
    if adapted is None or _mismatch(model, adapted):
        return weights
    _logger.warning("%s is resampled: %s has it for another image size", some(others), path)
    return adapted


def _without_lost_head(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`weights` without the classifier that a model of timm was made without."""
    names = getattr(model, "pretrained_cfg", None) or {}
    heads = names.get("classifier") or () if getattr(model, "num_classes", None) == 0 else ()
    own = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    expected = model.state_dict().keys()
    return {name: t for name, t in weights.items() if name in expected or not name.startswith(own)} if own else weights


def _original_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """`weights` under timm's names, by the model file's own filter; None where that cannot make them fit.

    Published files keep their authors' names or buffers timm no longer stores. Filters also resample position tables
    of another image size without a word, so a file that disagrees in a shape is not given to them.
    """
    expected = model.state_dict()
    if any(name in weights and weights[name].shape != tensor.shape for name, tensor in expected.items()):
        return None
    return _filtered(model, weights)


def _filtered(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """`weights` as the model file's own filter in timm leaves them; None where there is none, or it cannot."""
    rename = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        return {name: t for name, t in rename(dict(weights), model).items() if isinstance(t, Tensor)}
    except Exception:  # the filter knows some layouts only; the caller reports what is wrong with this one
        return None
