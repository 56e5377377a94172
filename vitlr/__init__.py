"""vitlr: compress trained Vision Transformers by activation-aware low rank, and run them faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlr.calibration.loop import calibrate
    from vitlr.calibration.statistics import Statistics
    from vitlr.checkpoint.creation import create_model
    from vitlr.checkpoint.files import load, save
    from vitlr.compression import compress
    from vitlr.decomposition.ranks import decompose
    from vitlr.decomposition.spectra import Spectra
    from vitlr.errors import InputError, NumericalError, RunError, VitlrError
    from vitlr.measuring.evaluation import evaluate
    from vitlr.nn import LowRankGLU, LowRankLinear, LowRankMLP, ResidualLowRankLinear, SelectedLinear
    from vitlr.planning.budgets import Budget, parse_budget
    from vitlr.planning.planner import plan
    from vitlr.planning.plans import Plan
    from vitlr.pruning.gated import prune
    from vitlr.pruning.hybrids import hybrid
    from vitlr.refinement import refine
    from vitlr.surgery.application import apply
    from vitlr.surgery.fusion import fuse, to_dense, unfuse

__version__ = "0.1.0"

# Public names by the module they live in, imported when first used: `vitlr --help` does not wait for torch.
_HOMES = {
    "calibration.loop": ("calibrate",),
    "calibration.statistics": ("Statistics",),
    "checkpoint.creation": ("create_model",),
    "checkpoint.files": ("load", "save"),
    "compression": ("compress",),
    "decomposition.ranks": ("decompose",),
    "decomposition.spectra": ("Spectra",),
    "errors": ("InputError", "NumericalError", "RunError", "VitlrError"),
    "measuring.evaluation": ("evaluate",),
    "nn": ("LowRankGLU", "LowRankLinear", "LowRankMLP", "ResidualLowRankLinear", "SelectedLinear"),
    "planning.budgets": ("Budget", "parse_budget"),
    "planning.planner": ("plan",),
    "planning.plans": ("Plan",),
    "pruning.gated": ("prune",),
    "pruning.hybrids": ("hybrid",),
    "refinement": ("refine",),
    "surgery.application": ("apply",),
    "surgery.fusion": ("fuse", "to_dense", "unfuse"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "InputError",
    "LowRankGLU",
    "LowRankLinear",
    "LowRankMLP",
    "NumericalError",
    "Plan",
    "ResidualLowRankLinear",
    "RunError",
    "SelectedLinear",
    "Spectra",
    "Statistics",
    "VitlrError",
    "apply",
    "calibrate",
    "compress",
    "create_model",
    "decompose",
    "evaluate",
    "fuse",
    "hybrid",
    "load",
    "parse_budget",
    "plan",
    "prune",
    "refine",
    "save",
    "to_dense",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
