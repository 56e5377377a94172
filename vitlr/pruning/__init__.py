"""Structured pruning: which hidden neurons an MLP has, how they are removed, what that costs."""

from vitlr.pruning.mlps import Mlp, find_mlps, narrowed_mlps, read_mlp, refused_mlps
from vitlr.pruning.removal import narrow_mlp

__all__ = ["Mlp", "find_mlps", "narrow_mlp", "narrowed_mlps", "read_mlp", "refused_mlps"]
