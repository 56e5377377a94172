"""A linear of integers whose input becomes bytes by the range of every token, and not by one that was seen before.

    v = multiplier ⊙ x + shift                  the columns' own steps and zeros, as in `int8_chain`
    q = round((v - l) / d),  d = (h - l) / 255  l, h the least and the largest of a token's v
    y = d scale ⊙ (W q) + l scale ⊙ (W 1) + b   W, scale, b as in `int8_chain`: v stands for x where it is not rounded

Nothing is cut off, whatever the images. A token has to be seen whole before any of it becomes bytes, so there is no
chain of such linears: what lies between two of them is floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitlr.ops.layers.int8_chain import LARGEST, Step, int8_chain


def reference(x: Tensor, step: Step) -> Tensor:
    """The specification, in plain torch: fp32, or fp64 where x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = x.to(dtype) * step.multiplier.to(dtype) + step.shift.to(dtype)
    low, d = ranges(v)
    q = ((v - low) / d).round()
    W, scale = step.codes.to(dtype), step.scale.to(dtype)
    return ((q @ W.T * d + low * W.sum(1)) * scale + step.bias.to(dtype)).to(x.dtype)


def int8_token(x: Tensor, step: Step) -> Tensor:
    """x [..., K] -> y [..., N] in x's dtype, by the kernels of `int8_chain`; what is not finite makes its token so.

    Raises `InputError` where `int8_chain` does, and for further columns (`wide`), which a range of its own needs not.
    """
    v = torch.addcmul(step.shift, x.reshape(-1, x.shape[-1]).float(), step.multiplier)
    low, d = ranges(v)
    rows = torch.cat([(v - low).div_(d), torch.ones_like(v[:1])])  # the last row's product is W 1
    one, none = torch.ones_like(step.multiplier), torch.zeros_like(step.shift)
    z = int8_chain(rows, [Step(step.codes, step.scale, torch.zeros_like(step.bias), one, none)], ["none"])
    y = torch.addcmul(step.bias, z[-1], low).addcmul_(z[:-1], d)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def ranges(v: Tensor) -> tuple[Tensor, Tensor]:
    """The least of every row [..., 1], and 1/255 of what it spans; above 0 where all of it is alike."""
    low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    return low, ((high - low) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
