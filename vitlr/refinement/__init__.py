"""Error compensation: anchored refit, regrown ranks, distillation; each kept only if held-out images agree."""

from typing import TYPE_CHECKING

from vitlr.runtime.lazy import lazily

if TYPE_CHECKING:
    from vitlr.refinement.ladder import refine
    from vitlr.refinement.recipe import RUNGS, Recipe
    from vitlr.refinement.report import Refinement, Rung

__all__ = ["RUNGS", "Recipe", "Refinement", "Rung", "refine"]

__getattr__ = lazily(
    __name__,
    {
        "vitlr.refinement.ladder": ["refine"],
        "vitlr.refinement.recipe": ["RUNGS", "Recipe"],
        "vitlr.refinement.report": ["Refinement", "Rung"],
    },
)
