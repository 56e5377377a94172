"""Structured pruning: which hidden neurons an MLP has, how they are removed, what that costs."""

from vitlr.pruning.removal import narrow_mlp
from vitlr.surfaces.mlps import Mlp, find_mlps, narrowed_mlps, read_mlp, refused_mlps

__all__ = ["Mlp", "find_mlps", "narrow_mlp", "narrowed_mlps", "read_mlp", "refused_mlps"]
