"""What is refused by its name alone, before torch is imported, a model built or weights fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitlr.checkpoint import folders
from vitlr.data.places import hub_name
from vitlr.errors import InputError

WEIGHT_FILES = {".safetensors", ".pt", ".pth", ".bin"}  # a model's name that ends so is meant as a file
_DATA, _MODELS = ("data", "val", "val_data"), ("model", "reference", "vs")


def check_places(given: Mapping[str, Any]) -> None:
    """`InputError` for images and models, by the parameters of a command, that are named where nothing is."""
    for name in (name for key in _DATA if (name := given.get(key)) is not None):
        hub_name(str(name))
    models = [given.get(key) for key in _MODELS]
    for name in map(str, filter(None, [*models, *(given.get("files") or ())])):
        if name.startswith(folders.LOCAL):
            folders.folder(name, folders.CONFIG)
        elif Path(name).suffix in WEIGHT_FILES and not Path(name).exists():
            raise InputError(f"{name}: no such file; check the path")
