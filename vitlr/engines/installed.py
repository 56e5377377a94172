"""Packages that only engines need: imported when they are, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from vitlr.errors import InputError

EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"}


def is_installed(package: str) -> bool:
    """Whether the package could be imported."""
    return importlib.util.find_spec(package) is not None


def need(package: str, what_for: str) -> Any:
    """The package, imported. Raises `InputError` with the extra that brings it where it is missing or broken."""
    try:
        return importlib.import_module(package)
    except Exception as cause:  # a broken install raises whatever its parts do
        extra = EXTRAS[package]
        missing = isinstance(cause, ModuleNotFoundError) and cause.name == package
        why = "is not installed" if missing else f"cannot be imported ({cause!s:.120})"
        raise InputError(f'{what_for} needs {package}, which {why}: pip install "vitlr[{extra}]"') from cause
