"""Plain rounding to the nearest, the rival that needs no images, with all else stored as vitlr stores it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from vitlr.anatomy.linears import targets
from vitlr.measuring.cost import rest
from vitlr.runtime import compact
from vitlr.runtime.copies import duplicate

GROUP = 64  # weights of a row that share a step and a zero
TRIES = 24  # ranges of a group


@torch.no_grad()
def nearest(model: nn.Module, bits: int, group: int | None = GROUP) -> tuple[nn.Module, int]:
    """A copy with every linear's weight rounded to the nearest of `2^bits` values of its group, and bytes of its file.

    The groups are `group` neighbours in a row, or whole rows (None); a step (float16) and a zero (`bits` bits) each.
    Weights stay floats in memory: this says what rounding costs, not how fast it could run.
    """
    small = duplicate(model)
    parts: dict[str, Tensor] = {}
    names = targets(small)
    for name in names:
        weight = small.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        codes, step, zero = rounded(weight, bits, group or weight.shape[1])
        weight.copy_(((codes - zero) * step).flatten(1)[:, : weight.shape[1]])
        parts |= {f"{name}.codes": packed(codes, bits), f"{name}.step": step.half()}
        parts |= {f"{name}.zero": packed(zero, bits)}
    for index, tensor in enumerate(rest(small, names)):
        tensor.copy_(compact.rounded(tensor.detach()))
        parts |= {f"{index}{form}": part.contiguous() for form, part in compact.stored(tensor).items()}
    return small, len(save(parts))


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, groups, group]`, and the step and zero of every group: the range that loses least of its weights.

    A row whose length is no multiple of `group` is filled up with zeros, which are met exactly.
    """
    top = 2**bits - 1
    groups = F.pad(weight.detach(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    best = torch.zeros_like(groups), torch.ones_like(low), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    for share in torch.linspace(1, 0.3, TRIES):
        step = ((high - low) * share / top).half().float().clamp(min=2.0**-24)
        zero = (-low * share / step).round().clamp(0, top)
        codes = (groups / step + zero).round().clamp(0, top)
        lost = ((codes - zero) * step - groups).square().sum(-1, True)
        found = codes, step, zero
        best = tuple(torch.where(lost < least, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
        least = torch.minimum(lost, least)
    return best


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side in `bits` bits each."""
    each = np.unpackbits(codes.flatten().to(torch.uint8).cpu().numpy()[:, None], axis=1)
    return torch.from_numpy(np.packbits(each[:, 8 - bits :]))
