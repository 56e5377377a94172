"""Structured pruning: which hidden neurons an MLP has, how they are removed, what that costs."""

from vitlr.anatomy.mlps import Mlp, find_mlps, narrowed_mlps, read_mlp, refused_mlps
from vitlr.surgery.mlps import narrow_mlp

__all__ = ["Mlp", "find_mlps", "narrow_mlp", "narrowed_mlps", "read_mlp", "refused_mlps"]
