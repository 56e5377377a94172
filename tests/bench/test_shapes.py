"""The shapes that benchmarks use are those of the models whose names they bear."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
shapes = importlib.import_module("bench.cases.shapes")


def _linears(model: torch.nn.Module) -> dict[str, list[tuple[int, int, int]]]:
    """(in_features, out_features, tokens an image) of every block's linears, by their last name."""
    found: dict[str, list[tuple[int, int, int]]] = {}

    def note(name):
        def hook(module, args):
            rows = args[0].numel() // args[0].shape[-1]
            found.setdefault(name, []).append((module.in_features, module.out_features, rows))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "blocks" in name and "downsample" not in name:
            module.register_forward_pre_hook(note(name.rpartition(".")[2]))
    size = model.default_cfg["input_size"]
    model(torch.empty(1, *size, device="meta"))
    return found


@pytest.mark.parametrize("name", sorted({g.model for g in shapes.GEOMETRIES}))
def test_geometry(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        found = _linears(model)
    expected = [linear for linear in shapes.linears() if linear.model.partition(".")[0] == name]
    assert expected
    for linear in expected:
        assert (linear.K, linear.N, linear.tokens) in found[linear.layer], (linear, set(found[linear.layer]))


def test_ranks_stay_below_break_even():
    for linear in shapes.linears():
        assert linear.ranks and all(r * (linear.K + linear.N) < linear.K * linear.N for r in linear.ranks)
