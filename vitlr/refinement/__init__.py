"""Error compensation: anchored refit, learnt residual, joint refinement; each kept only if held-out images agree."""

from vitlr.refinement.ladder import refine
from vitlr.refinement.recipe import RUNGS, Recipe
from vitlr.refinement.report import Refinement, Rung

__all__ = ["RUNGS", "Recipe", "Refinement", "Rung", "refine"]
