"""Removing channels for good: what gates of zero do to a block, done to its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitlr.anatomy import visibility
from vitlr.anatomy.mlps import read_mlp
from vitlr.errors import InputError
from vitlr.nn import SelectedLinear
from vitlr.pruning.gates import gates
from vitlr.pruning.sites import Site
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import put
from vitlr.surgery.mlps import narrow_mlp


@torch.no_grad()
def remove_channels(
    model: nn.Module, sites: Mapping[str, Site], keep: Mapping[str, Tensor], *, inplace: bool = False
) -> nn.Module:
    """Keep the channels `keep[site]` (increasing numbers) of every site named there; a new model by default.

    The function is that of gates of 1 on what is kept and 0 elsewhere. Hidden neurons go from fc1 and fc2
    (`narrow_mlp`). What comes from the residual stream is selected (`SelectedLinear`), and so are the heads: their rows
    of v are gone, and zeros stand for them where the attention multiplies.
    Raises `InputError` for a model with gates, for sites that it has not and channels that do not fit.
    """
    if gates(model):
        raise InputError("this model has gates; take them off first (remove_gates)")
    unknown = [name for name in keep if name not in sites]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no site of this model")
    if not inplace:
        model = duplicate(model)
    visibility.make_visible(model)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name, kept in keep.items():
        site = sites[name]
        _check(site, kept)
        if len(kept) == site.width:
            continue
        if site.kind == "fc2":
            narrow_mlp(read_mlp(model.get_submodule(site.parent), site.parent), kept)
            continue
        columns.update({reader: kept for reader in site.readers})
        for writer in site.writers:
            rows[writer] = _rows_left(site, kept, int(model.get_submodule(writer).out_features))  # type: ignore[arg-type]
    for name in dict.fromkeys([*columns, *rows]):
        put(model, name, SelectedLinear.from_linear(model.get_submodule(name), columns.get(name), rows.get(name)))
    visibility.put_back(model)
    return model


def _rows_left(site: Site, kept: Tensor, rows: int) -> Tensor:
    """All rows of a writer but those of the channels that go."""
    left = torch.ones(rows, dtype=torch.bool)
    left[site.first : site.first + site.width] = False
    left[site.first + kept.cpu()] = True
    return left.nonzero().flatten()


def _check(site: Site, kept: Tensor) -> None:
    if kept.ndim != 1 or not len(kept) or kept[0] < 0 or kept[-1] >= site.width or bool((kept.diff() <= 0).any()):
        raise InputError(f"{site.name}: expected at least one increasing channel number from 0 to {site.width - 1}")
