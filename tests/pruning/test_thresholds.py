"""Which gates go: the published threshold, one for each kind, by what they save; floors, tiles and budgets."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import count_params
from vitlr.pruning.channels import remove_channels
from vitlr.pruning.gates import add_gates, gates, remove_gates
from vitlr.pruning.options import KINDS
from vitlr.pruning.thresholds import choose, table

GATES = 2 * 7 * 32  # two blocks: qkv, proj, fc1 of 32, fc2 of 128


@pytest.fixture
def gated(tiny_vit) -> nn.Module:
    """Gates drawn at random, all different."""
    model = add_gates(tiny_vit())
    for gate in gates(model).values():
        gate.a.data = torch.rand_like(gate.a) * torch.sign(torch.randn_like(gate.a))
    return model


def small_of(gated: nn.Module, cut) -> nn.Module:
    found = {name: gate.site for name, gate in gates(gated).items()}
    return remove_channels(remove_gates(gated), found, cut.keep)


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.77])
def test_a_global_threshold_takes_the_smallest_of_all(gated, rate):
    cut = choose(gated, rate)
    every = torch.cat([gate.a.abs() for gate in gates(gated).values()]).double()
    gone = -(-int(rate * GATES * 1000) // 1000)  # as few as reach the rate
    threshold = every.sort().values[gone - 1].item()
    assert sum(len(kept) for kept in cut.keep.values()) == GATES - gone and cut.rate == pytest.approx(gone / GATES)
    for name, gate in gates(gated).items():
        assert torch.equal(cut.keep[name], (gate.a.detach().abs().double() > threshold).nonzero().flatten())
    assert max(cut.at.values()) == threshold and not cut.floors


def test_a_threshold_for_each_kind_takes_the_same_share(gated):
    for gate in gates(gated).values():
        gate.a.data *= {"qkv": 100, "proj": 10, "fc1": 1, "fc2": 0.01}[gate.site.kind]
    cut, published = choose(gated, 0.4, thresholds="type"), choose(gated, 0.4)
    for row in cut.rows:
        assert 1 - row.kept / row.gates == pytest.approx(0.4, abs=1 / row.gates + 1e-9)
    assert [row.kind for row in cut.rows] == list(KINDS)
    assert {row.kind: row.gates - row.kept for row in published.rows} == {"qkv": 0, "proj": 0, "fc1": 0, "fc2": 180}


def test_per_parameter_takes_what_saves_most_first(gated):
    for gate in gates(gated).values():
        gate.a.data.fill_(1)
    # One channel of qkv saves 96 weights, of fc1 128, of proj and fc2 32 columns and rows of 32 weights and a bias.
    cut = choose(gated, 64 / GATES, thresholds="params", floor=1)
    kept = {row.kind: row.kept for row in cut.rows}
    assert kept["fc1"] == 2 and kept["proj"] == 64 and kept["fc2"] == 256 and kept["qkv"] == 62
    assert len(cut.floors) == 2


def test_counts_are_those_of_the_model_that_comes_out(gated):
    before = count_params(remove_gates(gated))
    for thresholds in ("global", "type", "params"):
        cut = choose(gated, 0.5, thresholds=thresholds)
        assert cut.params == before and cut.params_kept == count_params(small_of(gated, cut))
        assert cut.params_kept < before


@pytest.mark.parametrize("thresholds", ["global", "type", "params"])
@pytest.mark.parametrize("tile", [1, 8])
def test_a_budget_is_met_and_not_undercut(gated, thresholds, tile):
    cut = choose(gated, budget="params:60%", thresholds=thresholds, tile=tile)
    limit = 0.6 * cut.params
    assert limit - (300 if tile == 1 else 8 * 300) < cut.params_kept <= limit
    assert all(len(kept) % tile == 0 for kept in cut.keep.values())
    other = choose(gated, budget="params:60%", thresholds=thresholds, of=2 * cut.params)
    assert other.params_kept == other.params  # 60 % of another model: this one fits


def test_a_layer_that_would_vanish_keeps_its_floor_and_is_named(gated):
    gates(gated)["blocks.1.mlp.fc2"].a.data *= 1e-6
    cut = choose(gated, 0.5)
    assert cut.floors == ("blocks.1.mlp.fc2",) and len(cut.keep["blocks.1.mlp.fc2"]) == 1
    assert "all of these were to go: blocks.1.mlp.fc2 (1 kept)" in str(cut) and cut.rate >= 0.5
    tiled = choose(gated, 0.5, tile=16)
    assert len(tiled.keep["blocks.1.mlp.fc2"]) == 16 and tiled.rate >= 0.5
    assert tiled.floors == ("blocks.1.mlp.fc2",)
    best = gates(gated)["blocks.1.mlp.fc2"].a.detach().abs().topk(16).indices.sort().values
    assert torch.equal(tiled.keep["blocks.1.mlp.fc2"], best)
    assert len(choose(gated, 0.5, floor=5).keep["blocks.1.mlp.fc2"]) == 5


def test_equal_gates_give_the_same_cut_every_time(tiny_vit):
    model = add_gates(tiny_vit())
    first, second = choose(model, 0.3, thresholds="type"), choose(model, 0.3, thresholds="type")
    assert all(torch.equal(first.keep[name], second.keep[name]) for name in first.keep)
    for row in first.rows:
        assert 1 - row.kept / row.gates == pytest.approx(0.3, abs=1 / row.gates)


def test_the_table_says_where_it_goes(gated):
    for gate in gates(gated).values():
        gate.a.data *= 1e-4 if gate.site.kind == "fc2" else 1
    cut = choose(gated, 0.4)
    lines = str(cut).splitlines()
    assert [line.split()[0] for line in lines[1:8]] == [*KINDS, "attention", "feed-forward", "all"]
    assert lines[6].split()[2:4] == ["56.2%", "100.0%"]  # 180 of 320 gates, and all that went
    both = table([cut, choose(gated, 0.4, thresholds="type")])
    shares = [float(line.split()[-1].rstrip("%")) for line in both.splitlines()[1:3]]
    assert shares[0] > 60 and shares[0] > shares[1]
    body = json.loads(json.dumps(cut.to_dict()))
    assert body["kinds"]["fc2"]["kept"] == 76 and body["widths"]["blocks.0.attn.qkv"] == 32 and body["floors"] == []


def test_bad_wishes_are_refused(gated, tiny_vit):
    for rate in (0, 1, -0.1, 1.5, float("nan"), True, "0.4"):
        with pytest.raises(InputError, match="expected the share of the gates that goes, between 0 and 1"):
            choose(gated, rate)
    with pytest.raises(InputError, match="either a rate"):
        choose(gated)
    with pytest.raises(InputError, match="either a rate"):
        choose(gated, 0.4, budget="params:50%")
    with pytest.raises(InputError, match="counts parameters"):
        choose(gated, budget="macs:50%")
    with pytest.raises(InputError, match="unknown thresholds 'local'"):
        choose(gated, 0.4, thresholds="local")
    with pytest.raises(InputError, match="tile=0"):
        choose(gated, 0.4, tile=0)
    with pytest.raises(InputError, match=r"rate 0\.999 cannot be reached"):
        choose(gated, 0.999)
    with pytest.raises(InputError, match=r"budget params:1% cannot be reached: .* parameters stay"):
        choose(gated, budget="params:1%")
    with pytest.raises(InputError, match="has no gates"):
        choose(tiny_vit(), 0.4)
    gates(gated)["blocks.0.attn.proj"].a.data[0] = float("inf")
    with pytest.raises(NumericalError, match=r"blocks\.0\.attn\.proj"):
        choose(gated, 0.4)
