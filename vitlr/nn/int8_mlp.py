"""A transformer MLP of linears that multiply bytes, as one module that one kernel runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitlr.nn._fused_mlp import activation_name
from vitlr.nn._plain import has_hooks, is_transformed
from vitlr.nn.fp8_linear import Fp8Linear
from vitlr.nn.int8_linear import Int8Linear
from vitlr.nn.lowrank_linear import LowRankLinear, steps_of
from vitlr.nn.lowrank_mlp import LowRankMLP


class Int8MLP(LowRankMLP):
    """`y = fc2(act(fc1(x)))` with both linears of bytes, and bytes between them that never leave the cache.

    fc1 and fc2 are each an `Int8Linear`, or a `LowRankLinear` of two. The children keep their names and are shared with
    the original module, which `back` gives back. Where somebody listens to a child, the children are called.
    """

    KIND: ClassVar[type[Int8Linear] | type[Fp8Linear]] = Int8Linear
    TAKES: ClassVar[tuple[type[nn.Module], ...]] = (Int8Linear, LowRankLinear)

    @classmethod
    def lacking(cls, linears: dict[str, nn.Module]) -> str | None:
        of_floats = [name for name, linear in linears.items() if steps(linear, cls.KIND) is None]
        return f"{', '.join(of_floats)} multiplies no bytes, or somebody listens to it" if of_floats else None

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        name, first, second = activation_name(act), steps(fc1, self.KIND), steps(fc2, self.KIND)
        if name and first and second and not has_hooks(act) and not is_transformed():
            acts = ["none"] * (len(first) - 1) + [name] + ["none"] * len(second)
            return self.KIND.CHAIN(x, [*first, *second], acts)
        return fc2(act(fc1(x)))


def steps(linear: nn.Module, kind: type[Int8Linear] | type[Fp8Linear] = Int8Linear) -> list[Any] | None:
    """The steps of a linear of that kind, one or two; None where it is none, or somebody listens to its calls."""
    if has_hooks(linear):
        return None
    if type(linear) is kind:
        return [linear.step]
    return steps_of(linear, kind) if type(linear) is LowRankLinear else None
