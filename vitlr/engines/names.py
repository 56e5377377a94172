"""Engines by name: what a model can be timed in or written for, and what of it is installed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vitlr.engines.installed import is_installed, need
from vitlr.errors import InputError

OURS = ("torch", "compile", "vitlr")  # plain torch; that compiled; fused, on our kernels
OTHERS = ("onnxruntime", "openvino")  # run an exported file
ALL = ("torch", "compile", *OTHERS, "vitlr")
TARGETS = {"onnx": ".onnx", "openvino": ".xml"}  # what a model is written for, by the file's ending


def installed() -> tuple[str, ...]:
    """All that can be had here, others' with what an export for them takes."""
    return tuple(name for name in ALL if name in OURS or all(map(is_installed, ("onnx", "onnxscript", name))))


def check_engines(names: Iterable[str], said: str) -> tuple[str, ...]:
    """Each name once. Raises `InputError` for unknown ones, and for others' that are not installed: which extra is."""
    kept = tuple(dict.fromkeys(names))
    for name in kept:
        if name not in ALL:
            raise InputError(f"{said}: {name!r} is unknown, expected some of {', '.join(ALL)}")
        if name in OTHERS:
            need(name, f"{said}: {name}")
    return kept


def parse_engines(text: str) -> tuple[str, ...]:
    """Names apart by commas, or `all` that are installed. Raises `InputError` as `check_engines` does."""
    if text.strip() == "all":
        return installed()
    return check_engines((name.strip() for name in text.split(",")), f"--engines {text!r}")


def check_target(path: str | os.PathLike[str], to: str | None) -> str:
    """What is written, by name or by the path's ending.

    `InputError` where it is unknown, where name and ending disagree, and where what it takes is not installed.
    """
    path = Path(path)
    ending = path.suffix.lower()
    said = f"{path.name} tells no engine" if to is None else f"to={to!r} for {path.name}"
    if to is None:
        to = next((name for name, suffix in TARGETS.items() if suffix == ending), None)
    if to not in TARGETS:
        raise InputError(f"{said}, expected one of {', '.join(TARGETS)}, or a path in .onnx or .xml")
    if ending != TARGETS[to]:
        raise InputError(f"{path} cannot be for {to}: such files end in {TARGETS[to]}")
    for package in ("onnx", "onnxscript", "openvino" if to == "openvino" else "onnxruntime"):
        need(package, f"export to {to}")
    return to
