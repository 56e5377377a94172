"""Modules that stand where dense ones stood."""

from vitlr.nn.folded_scale import FoldedScale
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.nn.lowrank_mlp import LowRankMLP

__all__ = ["FoldedScale", "LowRankLinear", "LowRankMLP"]
