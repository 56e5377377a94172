"""Where images are, as a path names it: on this disk, or on the Hub. Importing this costs no torch."""

from __future__ import annotations

from pathlib import Path

from vitlr.errors import InputError


def hub_name(path: str) -> str | None:
    """NAME of `hfds/NAME`, None for what is on this disk; `InputError` where nothing is."""
    if Path(path).exists():
        return None
    prefix, _, rest = path.partition("/")
    if prefix.lower() == "hfds" and rest:
        return rest
    raise InputError(f"no data at {path}: expected a folder of images, a .tar or hfds/NAME")
