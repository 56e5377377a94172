"""Plain rounding to the nearest, with all else stored as vitlr stores it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.compare.frontier.rivals import GROUP, Made, Make
from bench.compare.frontier.subjects import Subject
from vitlr.anatomy.linears import targets
from vitlr.measuring.cost import rest
from vitlr.runtime import compact

NEAREST = (8, 6, 4, 3, 2)  # bits
TRIES = 24  # ranges of a group


def nearest(bits: int, group: int | None) -> Make:
    """Every weight of a block to the nearest of `2^bits` values of its group (None: of its row)."""

    def make(subject: Subject, folder: Path) -> Made:
        model, parts = copy.deepcopy(subject.model).requires_grad_(False), {}
        names = targets(model)
        for name in names:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            codes, step, zero = rounded(weight, bits, group or weight.shape[1])
            weight.copy_(((codes - zero) * step).flatten(1))
            parts |= {f"{name}.codes": packed(codes, bits), f"{name}.step": step.half()}
            parts |= {f"{name}.zero": packed(zero, bits)}
        for index, tensor in enumerate(rest(model, names)):
            tensor.copy_(compact.rounded(tensor))
            parts |= {f"{index}{form}": part for form, part in compact.stored(tensor).items()}
        path = folder / "model.safetensors"
        save_file(parts, path)
        return model, path.stat().st_size, {}

    return make


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, groups, group]`, and the step and zero of every group: the range that loses least of its weights."""
    top, groups = 2**bits - 1, weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    best, least = (
        (torch.zeros_like(groups), torch.ones_like(low), torch.zeros_like(low)),
        torch.full_like(low, torch.inf),
    )
    for share in torch.linspace(1, 0.3, TRIES):
        step = ((high - low) * share / top).half().float().clamp(min=2.0**-24)
        zero = (-low * share / step).round().clamp(0, top)
        codes = (groups / step + zero).round().clamp(0, top)
        lost = ((codes - zero) * step - groups).square().sum(-1, True)
        best = tuple(torch.where(lost < least, new, old) for new, old in zip((codes, step, zero), best, strict=True))
        least = torch.minimum(lost, least)
    return best


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side in `bits` bits each."""
    each = np.unpackbits(codes.flatten().to(torch.uint8).numpy()[:, None], axis=1)
    return torch.from_numpy(np.packbits(each[:, 8 - bits :]))


PLAIN = {
    f"nearest, {bits} bits, {'a row' if group is None else f'groups of {group}'}": nearest(bits, group)
    for bits in NEAREST
    for group in (GROUP, None)
}
