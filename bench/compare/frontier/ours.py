"""What vitlr does, through the calls that a user would write; and plain rounding, with all else stored as ours is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import vitlr
from bench.compare.frontier.rivals import GROUP, Made, Make
from bench.compare.frontier.subjects import Subject
from vitlr.anatomy.linears import targets
from vitlr.measuring.cost import rest
from vitlr.runtime import compact

HEADER = 42e3  # bytes of a file beside the numbers: names and the plan
SIZES = {"vit_tiny": (5.6, 3.4, 2.8, 2.3, 1.8), "dinov2": (20.0, 12.0, 9.4, 6.8)}  # MB of the whole file
NEAREST = (8, 6, 4, 3, 2)  # bits
TRIES = 24  # ranges of a group


def small(megabytes: float, method: str) -> Make:
    """A file of so many megabytes, read back; one calibration serves all sizes and methods."""

    def make(subject: Subject, folder: Path) -> Made:
        budget = f"bytes:{megabytes * 1e6 - HEADER:.0f}"
        known = subject.spectra.get(method)
        plan = vitlr.plan(subject.model, statistics(subject, folder), budget, method=method, spectra=known)
        subject.spectra[method] = plan.spectra
        path = folder / "model.safetensors"
        vitlr.save(vitlr.apply(subject.model, plan), path, plan=plan)
        return vitlr.load(path), path.stat().st_size, {"predicted": plan.error}

    return make


def statistics(subject: Subject, folder: Path) -> vitlr.Statistics:
    """Of all calibration images, of an earlier run where there was one."""
    path = folder / "statistics.safetensors"
    if not path.is_file():
        how: dict[str, Any] = {"objective": "loss", "extras": ("rounding",), "hidden": True}
        vitlr.calibrate(subject.model, subject.images, **how).save(path)
    return vitlr.Statistics.load(path)


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


def ours(subject: str) -> dict[str, Make]:
    """All rows of plain rounding and of vitlr, by their names."""
    rows: dict[str, Make] = {}
    for bits in NEAREST:
        rows[f"nearest, {bits} bits, groups of {GROUP}"] = nearest(bits, GROUP)
        rows[f"nearest, {bits} bits, a row"] = nearest(bits, None)
    for size in SIZES[subject]:
        rows[f"vitlr bits, {size:g} MB"] = small(size, "bits")
        rows[f"vitlr mixed, {size:g} MB"] = small(size, "mix")
    return rows
