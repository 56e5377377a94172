"""vitlr: compress trained Vision Transformers by activation-aware low rank, and run them faster."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names by the module they live in, imported when first used: `vitlr --help` does not wait for torch.
# `__init__.pyi` says to editors and type checkers what they are.
_HOMES = {
    "calibration.loop": ("calibrate",),
    "calibration.statistics": ("Statistics",),
    "checkpoint.creation": ("create_model",),
    "checkpoint.files": ("load", "save"),
    "compression": ("compress",),
    "decomposition.solving": ("decompose",),
    "decomposition.spectra": ("Spectra",),
    "engines.export": ("export",),
    "errors": ("InputError", "NumericalError", "RunError", "VitlrError"),
    "measuring.evaluation": ("evaluate",),
    "nn": (
        "Int8Linear",
        "LowRankGLU",
        "LowRankLinear",
        "LowRankMLP",
        "QuantizedLinear",
        "ResidualLowRankLinear",
        "SelectedLinear",
    ),
    "planning.budgets": ("Budget", "parse_budget"),
    "planning.planner": ("plan",),
    "planning.plans": ("Plan",),
    "pruning.gated": ("prune",),
    "pruning.hybrids": ("hybrid",),
    "refinement.ladder": ("refine",),
    "reporting.frontier": ("Frontier", "frontier"),
    "reporting.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "reporting.report": ("report",),
    "surgery.application": ("apply",),
    "surgery.fusion": ("fuse", "to_dense", "unfuse"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
