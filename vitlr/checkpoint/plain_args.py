"""Arguments that a file may name for a model of another library: JSON of plain numbers and words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitlr.errors import InputError

Args = dict[str, Any]
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,79}")
_TEXT = re.compile(r"[A-Za-z0-9_.\-]{0,64}")
_LARGEST = 1_000_000
# What would have a configuration fetch code or weights: other models by name, kernels by repository.
_FETCHED = re.compile(r"_.*|.*backbone.*|auto_map|.*name_or_path|quantization_config|trust_remote_code|.*checkpoint.*")


def plain(key: str, value: Any, nested: int = 4) -> Any:
    """The value, if it is JSON of plain numbers and words. Raises `InputError`."""
    if isinstance(value, Mapping) and nested and len(value) <= 200:
        for inner in value:
            if not isinstance(inner, str) or not _KEY.fullmatch(inner) or _FETCHED.fullmatch(inner):
                raise InputError(f"the model's {key} has {str(inner)[:80]!r}, which no file may set")
        return {inner: plain(inner, of, nested - 1) for inner, of in value.items()}
    if isinstance(value, (list, tuple)) and nested and len(value) <= 256:
        return [plain(key, item, nested - 1) for item in value]
    number = isinstance(value, (int, float)) and abs(value) <= _LARGEST  # NaN compares false
    if value is None or isinstance(value, bool) or number or (isinstance(value, str) and _TEXT.fullmatch(value)):
        return value
    raise InputError(f"the model argument {key}={str(value)[:80]!r} is not a plain value in range")
