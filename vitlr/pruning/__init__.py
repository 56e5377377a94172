"""Structured pruning: which hidden neurons an MLP has, how they are removed, what that costs."""

from typing import TYPE_CHECKING

from vitlr.runtime.lazy import lazily

if TYPE_CHECKING:
    from vitlr.anatomy.mlps import Mlp, find_mlps, narrowed_mlps, read_mlp, refused_mlps
    from vitlr.surgery.mlps import narrow_mlp

__all__ = ["Mlp", "find_mlps", "narrow_mlp", "narrowed_mlps", "read_mlp", "refused_mlps"]

__getattr__ = lazily(
    __name__,
    {
        "vitlr.anatomy.mlps": ["Mlp", "find_mlps", "narrowed_mlps", "read_mlp", "refused_mlps"],
        "vitlr.surgery.mlps": ["narrow_mlp"],
    },
)
