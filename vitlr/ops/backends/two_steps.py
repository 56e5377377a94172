"""An MLP whose fc2 stayed dense, as two steps: fc1 with its activation in one launch, then one dense product.

The sums [BM, N] of a dense fc2 are too wide for the registers of a kernel that does both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers import lowrank_linear
from vitlr.ops.layers.lowrank_mlp import OP, Key


def _first_step(key: Key) -> tuple[registry.Candidate, lowrank_linear.Key] | str:
    """The Triton candidate that runs fc1 with its activation and the key of that call, or why there is none."""
    if key.r1 is None or key.r2 is not None:
        return "fc1 must be low-rank and fc2 dense: for others there is a kernel of both"
    inner = lowrank_linear.Key(key.M, key.K, key.D, key.r1, True, key.act, False, key.dtype, key.device)
    known = [c for c in reversed(registry.candidates(lowrank_linear.OP)) if c.backend == "triton"]
    reasons = {c.name: c.supports(inner) for c in known}
    able = [c for c in known if reasons[c.name] is None]
    if able:
        return min(able, key=lambda c: c.worth(inner) is not None), inner
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "lowrank_linear has no Triton kernel"


def objection(key: Key) -> str | None:
    """Why a call cannot run as two steps, or None."""
    step = _first_step(key)
    return step if isinstance(step, str) else None


def floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of fc1's kernel, of the dense product and of the residual's sum."""
    step = _first_step(key)
    if isinstance(step, str) or step[0].floor is None:
        return None
    one = step[0].floor(step[1], ceilings)
    two = floors.separate(key.M or 0, [(key.D, key.N, None)], 3 * key.N * key.residual, key.dtype, ceilings)
    return None if one is None or two is None else one + two


def run(x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Tensor, A2: Any, b2: Any, residual: Any, act: str) -> Tensor:
    """The arguments and the result of the op. Raises InputError where fc1's kernel does not take its shape."""
    D, N = B2.shape[1], B2.shape[0]
    M = x.numel() // max(x.shape[-1], 1)
    step = _first_step(Key(M, x.shape[-1], D, N, B1.shape[0], None, act, residual is not None, x.dtype, x.device))
    if isinstance(step, str):
        raise InputError(f"{OP}: {step}")
    y = F.linear(step[0].run(x, B1, A1, b1, None, act), B2, b2)
    return y if residual is None else y + residual


_worth = functools.partial(floors.pays, OP, "triton.two_steps")
registry.register(OP, registry.Candidate("triton.two_steps", objection, run, worth=_worth, floor=floor))
