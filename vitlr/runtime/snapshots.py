"""Training that can be cut short: its state as safetensors in a folder, and only ever read back by the same run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime import processes
from vitlr.runtime.kinds import PLAIN, Spec, check
from vitlr.runtime.places import check_writable
from vitlr.runtime.storage import load_tensors, save_tensors

SCHEMA = 1


class Snapshots:
    """What a run has reached, in `folder` (None keeps nothing).

    `run` describes the run: weights it starts from, images, choices; `kind` says what wrote the files. Raises
    `InputError` where the folder cannot be written or holds another run.
    """

    kind = "training"
    words: Mapping[str, str] = {}  # what files of earlier versions call things, and what these are called now

    def __init__(self, folder: str | os.PathLike[str] | None, run: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.run = dict(run)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as cause:
                raise InputError(f"cannot keep snapshots in {self.folder}: {cause.strerror or cause}") from cause
            check_writable(self.folder / "state.safetensors")

    def save(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep tensors and plain values under `name`, in place of what was there, atomically."""
        if self.folder is not None and processes.first():
            stored = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
            header = {"run": self.run, "state": dict(state)}
            save_tensors(self._path(name), stored, header, kind=self.kind, schema=SCHEMA)

    def load(self, name: str, spec: Spec = PLAIN) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under `name`, its plain values being of the kinds of `spec`; None where nothing was.

        Raises `InputError` where it is of another run, or damaged.
        """
        path = None if self.folder is None else self.found(name)
        if path is None:
            return None
        tensors, header = load_tensors(path, kind=self.kind, schema=SCHEMA)
        kept = _renamed(header.get("run"), self.words)
        if kept != self.run:
            what, was, now = _difference(kept, self.run)
            raise InputError(
                f"{path} is of another run: its {what} was {was!r}, now it is {now!r}; "
                "name another folder, or remove that file"
            )
        check(header, {"state": spec, "*": PLAIN}, f"{path} is damaged: its header")
        return tensors, header["state"]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def found(self, name: str) -> Path | None:
        """The file of that name, or of a name that it had before; None where there is none."""
        older = [name.replace(now, was) for was, now in self.words.items() if now in name]
        return next((path for path in map(self._path, [name, *older]) if path.exists()), None)


def _renamed(value: Any, words: Mapping[str, str]) -> Any:
    """The description of a run with its keys and words as they are today."""
    if isinstance(value, dict):
        return {words.get(key, key): _renamed(part, words) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, words) for part in value]
    return words.get(value, value) if isinstance(value, str) else value


def _difference(was: Any, now: Mapping[str, Any], of: str = "") -> tuple[str, Any, Any]:
    """The first entry in which two descriptions of a run differ: its name, what it was, what it is now."""
    known = was if isinstance(was, dict) else {}
    key = next((key for key in now if known.get(key) != now[key]), None)
    if key is None:
        return of or "run", was, now
    if isinstance(now[key], dict) and isinstance(known.get(key), dict):
        return _difference(known[key], now[key], f"{of}{key} ")
    return of + key, known.get(key), now[key]


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, to come back to."""
    return {name: tensor.detach().clone() for name, tensor in stored(model).items()}


def check_like(tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Raise `InputError` unless the tensors are the model's by name, shape and dtype: `copy_` adapts."""
    own = stored(model)
    if tensors.keys() != own.keys():
        raise InputError(f"{where}: {min(tensors.keys() ^ own.keys()):.120} is not both in it and in the model")
    for name, tensor in own.items():
        found = tensors[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise InputError(
                f"{where}: {name:.120} is {found.dtype} {list(found.shape)}, the model has {tensor.dtype} "
                f"{list(tensor.shape)}"
            )


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `copied` gave, in place."""
    for name, tensor in stored(model).items():
        tensor.copy_(tensors[name])
