"""vitlr: compress trained Vision Transformers by activation-aware low rank, and run them faster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitlr.budgets import Budget, parse_budget
    from vitlr.calibration import calibrate
    from vitlr.checkpoint import load, save
    from vitlr.compression import compress
    from vitlr.decomposition import decompose
    from vitlr.errors import InputError, NumericalError, RunError, VitlrError
    from vitlr.evaluation import evaluate
    from vitlr.hybrids import hybrid
    from vitlr.models import create_model
    from vitlr.nn import LowRankGLU, LowRankLinear, LowRankMLP, ResidualLowRankLinear, SelectedLinear
    from vitlr.pipeline import apply, plan
    from vitlr.plans import Plan
    from vitlr.refinement import refine
    from vitlr.spectra import Spectra
    from vitlr.statistics import Statistics
    from vitlr.surgery import fuse, to_dense, unfuse
    from vitlr.vtp import prune

__version__ = "0.1.0"

# Public names by the module they live in, imported when first used: `vitlr --help` does not wait for torch.
_HOMES = {
    "budgets": ("Budget", "parse_budget"),
    "calibration": ("calibrate",),
    "checkpoint": ("load", "save"),
    "decomposition": ("decompose",),
    "errors": ("InputError", "NumericalError", "RunError", "VitlrError"),
    "evaluation": ("evaluate",),
    "models": ("create_model",),
    "nn": ("LowRankGLU", "LowRankLinear", "LowRankMLP", "ResidualLowRankLinear", "SelectedLinear"),
    "compression": ("compress",),
    "pipeline": ("apply", "plan"),
    "plans": ("Plan",),
    "hybrids": ("hybrid",),
    "vtp": ("prune",),
    "refinement": ("refine",),
    "spectra": ("Spectra",),
    "statistics": ("Statistics",),
    "surgery": ("fuse", "to_dense", "unfuse"),
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
