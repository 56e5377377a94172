"""`vitlr/__init__.pyi` says what the public names are: those of `_HOMES`, and every option of the functions by name.

Run as a program it writes the file anew.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import vitlr

PATH = Path(vitlr.__file__).with_name("__init__.pyi")
# Functions that take options of a stage as keywords: editors are told them one by one.
SPELT = ("apply", "calibrate", "compress", "decompose", "evaluate", "hybrid", "plan", "prune", "refine")
HEAD = '''"""What `import vitlr` offers, for editors and type checkers; tests/test_stub.py writes this file."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
'''
NEEDED = {  # by the signatures
    "calibration.options": ["Calibration"],
    "compression": ["Measure"],
    "measuring.evaluation": ["Metrics"],
    "measuring.times": ["Times"],
    "planning.options": ["Planning"],
    "pruning.options": ["Blending", "Gating"],
    "refinement.recipe": ["Recipe"],
    "runtime.progress": ["Progress", "Watch"],
    "training.loop": ["TrainStep"],
    "training.recipe": ["TrainRecipe"],
}


def stub() -> str:
    """The whole file."""
    imports = [(module, ", ".join(names)) for module, names in NEEDED.items()]
    public = [(module, name) for module, names in vitlr._HOMES.items() for name in names if name not in SPELT]
    imports += [(module, f"{name} as {name}") for module, name in public]
    lines = [HEAD, *(f"from vitlr.{module} import {names}" for module, names in sorted(imports)), ""]
    lines += ["__version__: str", ""]
    for name in SPELT:
        signature = inspect.signature(getattr(vitlr, name))
        lines += [f"def {name}(", *parameters(signature), f") -> {signature.return_annotation}: ..."]
    return "\n".join(lines) + "\n"


def parameters(signature: inspect.Signature) -> list[str]:
    """One a line."""
    lines, bare = [], True
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and bare:
            lines, bare = [*lines, "    *,"], False
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    return lines


def test_the_stub_says_every_public_name_and_option():
    assert PATH.read_text() == stub(), "python tests/test_stub.py writes it anew"
    assert vitlr.__all__ == sorted(name for names in vitlr._HOMES.values() for name in names)


if __name__ == "__main__":
    PATH.write_text(stub())
