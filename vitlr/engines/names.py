"""Engines by name: what a model can be timed in, and what of it is installed."""

from __future__ import annotations

from collections.abc import Iterable

from vitlr.engines.installed import is_installed, need
from vitlr.errors import InputError

OURS = ("torch", "compile", "vitlr")  # plain torch; that compiled; fused, on our kernels
OTHERS = ("onnxruntime", "openvino")  # run an exported file
ALL = ("torch", "compile", *OTHERS, "vitlr")


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
