"""The models that a command line names: files that vitlr wrote, or timm names with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.checkpoint import files as checkpoint_file
from vitlr.checkpoint import folders
from vitlr.checkpoint.creation import create_model, origin
from vitlr.cli.early import WEIGHT_FILES
from vitlr.errors import InputError
from vitlr.runtime import processes

_RESULTS = {"--out": "model", "--plan-out": "plan"}  # what an earlier run may have left there
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """How a timm name becomes a model: `checkpoint` (None: timm's pretrained weights) and architecture arguments."""

    checkpoint: Path | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    new_head: bool = False  # weights for other classes or another image size are taken, but for the classifier
    key: str | None = None  # which state dict of the weight file, where several fit


def names_a_file(name: str) -> bool:
    """Whether `name` is meant as a file that rebuilds itself, alone or in a folder, rather than as a timm name."""
    if folders.is_folder_name(name):
        return folders.is_ours(name)
    return Path(name).is_file() or Path(name).suffix in WEIGHT_FILES


def open_model(name: str, source: Source, *, device: torch.device, weights: bool = True) -> nn.Module:
    """The model `name` in eval mode on `device`; without `weights`, a timm model may keep its random ones.

    Raises `InputError` for unknown names, files that are damaged or do not fit, and options a file has no use for.
    """
    if names_a_file(name) and source.new_head and source.checkpoint is None and source.args.keys() == {"num_classes"}:
        return _with_new_head(checkpoint_file.load(name, device=device), source.args["num_classes"])
    if names_a_file(name):
        given = {"--checkpoint": source.checkpoint, "--checkpoint-key": source.key}
        flags = [flag for flag, value in given.items() if value is not None]
        if unwanted := [*flags, *(f"the model argument {key}" for key in source.args)]:
            raise InputError(
                f"{unwanted[0]} goes with a timm name; {name} is a file that knows its own model and weights"
            )
        return checkpoint_file.load(name, device=device)
    pretrained = weights and source.checkpoint is None
    return create_model(
        name,
        checkpoint=source.checkpoint,
        checkpoint_key=source.key,
        pretrained=pretrained,
        new_head=source.new_head,
        **source.args,
    ).to(device)


def _with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """A model of a file with a classifier for other classes, as timm makes it."""
    found = origin(model)
    if found is None or not callable(getattr(model, "reset_classifier", None)):
        raise InputError("--num-classes makes a new head of timm's models only; give the model a head in Python")
    model.reset_classifier(classes)  # type: ignore[operator]
    model.vitlr_origin = {**found, "args": {**found["args"], "num_classes": classes}}  # type: ignore[assignment]
    return model.eval()


def open_pair(
    name: str,
    source: Source,
    reference: str | None,
    reference_checkpoint: Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, nn.Module | None]:
    """The model `name` and the one it is compared with, both fed the same tensors.

    One --checkpoint, its key and one set of arguments are for the one model that needs them. Raises `InputError` as
    `open_model` does, and for a reference that is fed otherwise.
    """
    if reference is None and reference_checkpoint is not None:
        raise InputError("--reference-checkpoint goes with --reference")
    by_name = not names_a_file(name)
    reference_by_name = reference is not None and not names_a_file(reference)
    key = source.key
    if source.checkpoint is None and reference_checkpoint is not None:
        source = replace(source, key=None)
    elif by_name:
        key = None
    theirs = Source(reference_checkpoint, key=key)
    if reference_by_name:
        theirs = Source(reference_checkpoint or (None if by_name else source.checkpoint), source.args, key=key)
    network = open_model(name, source if by_name or not reference_by_name else Source(), device=device).to(dtype)
    if reference is None:
        return network, None
    other = open_model(reference, theirs, device=device).to(dtype)
    _check_same_input(network, other, reference)
    return network, other


def _check_same_input(model: nn.Module, reference: nn.Module, name: str) -> None:
    """Both models see the same tensors, so those must be made the same way."""
    from vitlr.data.preprocessing import data_config

    ours, theirs = data_config(model), data_config(reference)
    for key in ("input_size", "mean", "std"):
        if ours[key] != theirs[key]:
            raise InputError(
                f"the reference {name} wants {key} {theirs[key]}, the model {ours[key]}; they cannot be compared"
            )


def parse_device(name: str | None) -> torch.device:
    """cpu, cuda or cuda:N; None is the GPU where there is one, of several processes its own.

    `InputError` for one that is unknown or not there.
    """
    name = processes.place(name)
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise InputError(f"--device {name!r} is unknown, expected cpu, cuda or cuda:N") from cause
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r} is not supported, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InputError(f"--device {name!r} is not there: torch sees {found} CUDA devices")
    return device


def parse_precision(name: str) -> torch.dtype:
    """The dtype of that name; `InputError` for another."""
    if name not in _PRECISIONS:
        raise InputError(f"--precision {name!r} is unknown, expected {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]


def check_destinations(outputs: Mapping[str, Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse places that cannot be written, that are read or written twice, and results that would replace a stranger.

    All by their flags; flags without a path are left out.
    """
    from vitlr.runtime.places import check_writable

    named = {flag: path for flag, path in outputs.items() if path}
    others = {**{flag: Path(path) for flag, path in inputs.items() if path}, **named}
    for flag, path in named.items():
        check_writable(path)
        twin = next((f for f, p in others.items() if f != flag and p.resolve() == path.resolve()), None)
        if twin is not None:
            raise InputError(f"{flag} and {twin} are both {path}; name two files")
        if flag in _RESULTS:
            _check_replaceable(flag, path)


def _check_replaceable(flag: str, path: Path) -> None:
    """An earlier result may be replaced; a file that is none, such as somebody's only copy of weights, may not."""
    from vitlr.checkpoint import files
    from vitlr.planning.plans import Plan
    from vitlr.runtime import storage

    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        if flag == "--out":
            storage.load_header(path, kind="model", schema=files.SCHEMA)
        else:
            Plan.load(path)
    except InputError as cause:
        what = _RESULTS[flag]
        raise InputError(f"{flag} {path} is there and is no vitlr {what}; remove it or name another file") from cause
