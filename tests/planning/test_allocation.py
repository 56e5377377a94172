"""Plans from hand-made spectra: budgets kept, reasons given, nothing left to chance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlr.decomposition.spectra import LayerSpectrum, Spectra
from vitlr.errors import InputError
from vitlr.measuring.cost import Cost
from vitlr.planning.allocation import allocate
from vitlr.planning.budgets import parse_budget
from vitlr.planning.forms import Sizes
from vitlr.planning.options import Planning
from vitlr.planning.plans import Plan

SHAPES = {"qkv": (96, 32), "proj": (32, 32), "fc1": (128, 32), "fc2": (32, 128)}
OUTSIDE = 5000


def spectra_of(blocks=3, seed=0, centred=False):
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for b in range(blocks):
        for kind, (n, k) in SHAPES.items():
            size = min(n, k)
            decay = 0.5 + 2.5 * torch.rand(1, generator=g, dtype=torch.float64)
            energies = 10 ** (-b) * torch.arange(1, size + 1, dtype=torch.float64) ** -decay
            eye = torch.eye(size, dtype=torch.float64)
            name = f"blocks.{b}.{kind}"
            layers[name] = LayerSpectrum(name, k, n, "output" if n <= k else "input", energies, eye, eye)
    return Spectra(layers, "loss", "0" * 16, centred=centred)


def sizes_of(spectra, has_bias=True):
    weights = sum(s.in_features * s.out_features for s in spectra.layers.values())
    params = weights + OUTSIDE
    names = list(spectra.layers)
    return Sizes(
        Cost(params, 10 * weights + 777, 4 * params + 88),
        dict.fromkeys(names, 10.0),
        dict.fromkeys(names, 4),
        dict.fromkeys(names, has_bias),
    )


def plan_of(budget, spectra=None, has_bias=True, **options):
    spectra = spectra or spectra_of()
    options.setdefault("rank_step", 4)
    return allocate(spectra, sizes_of(spectra, has_bias), parse_budget(budget) if budget else None, Planning(**options))


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.45, 1.0), seed=st.integers(0, 1000), quantity=st.sampled_from(["params", "macs", "bytes"]))
def test_every_budget_is_kept_and_nearly_spent(share, seed, quantity):
    plan = plan_of(f"{quantity}:{share * 100:.6f}%", spectra_of(seed=seed))
    kept, total = getattr(plan, f"{quantity}_kept"), getattr(plan, quantity)
    limit = round(share * 100, 6) / 100 * total
    assert kept <= limit
    step = 4 * (128 + 32) * {"params": 1, "macs": 10, "bytes": 4}[quantity]
    jump = (
        max(row.in_features * row.out_features for row in plan.layers) * {"params": 1, "macs": 10, "bytes": 4}[quantity]
    )
    assert limit - kept <= max(step, jump) or not plan.ranks


def test_allocation_beats_uniform_and_both_keep_the_same_budget():
    ours, uniform = plan_of("params:60%"), plan_of("params:60%", uniform=True)
    assert ours.error < uniform.error
    assert max(ours.params_kept, uniform.params_kept) <= 0.6 * ours.params


def test_a_whole_budget_keeps_everything_dense():
    plan = plan_of("params:100%")
    assert not plan.ranks and plan.error == 0 and plan.params_kept == plan.params


def test_ranks_are_multiples_of_the_step_below_break_even():
    plan = plan_of("params:50%", rank_step=8, min_rank=5)
    for row in plan.layers:
        if row.rank is not None:
            assert row.rank % 8 == 0 and row.rank >= 5
            assert row.rank * (row.in_features + row.out_features) < row.in_features * row.out_features


def test_equal_spectra_give_equal_bytes_and_json_round_trips():
    one, two = plan_of("params:55%").to_json(), plan_of("params:55%").to_json()
    assert one == two
    assert Plan.from_json(one).to_json() == one


def test_unreachable_budgets_say_what_is_reachable():
    with pytest.raises(InputError, match=r"smallest plan keeps .*%") as error:
        plan_of("params:1%")
    reachable = float(str(error.value).split("keeps ")[1].split("%")[0])
    assert plan_of(f"params:{reachable + 0.01}%").params_kept > 0
    with pytest.raises(InputError):
        plan_of(f"params:{reachable - 0.01}%")
    with pytest.raises(InputError, match="cannot be reached"):
        plan_of("params:1%", uniform=True)


def test_rank_buckets_bound_the_distinct_ranks_of_a_position():
    spectra = spectra_of(blocks=8)
    free, bucketed = plan_of("params:60%", spectra), plan_of("params:60%", spectra, rank_buckets=2)
    assert len({row.rank for row in free.layers if row.name.endswith("fc1")}) > 2
    for kind in SHAPES:
        assert len({row.rank for row in bucketed.layers if row.name.endswith(kind) and row.rank is not None}) <= 2
    assert bucketed.params_kept <= 0.6 * bucketed.params
    least = float(str(_refusal("params:1%", spectra)).split("keeps ")[1].split("%")[0])
    assert plan_of(f"params:{least + 0.01}%", spectra, rank_buckets=1).params_kept > 0


def test_stages_of_other_widths_have_buckets_of_their_own():
    spectra = spectra_of(blocks=4)
    for name in list(spectra.layers):
        layer = spectra.layers[name]
        if name.startswith(("blocks.2", "blocks.3")):  # wider stages, whose smallest useful rank is larger
            wide = torch.cat([layer.energies] * 4).sort(descending=True).values
            eye = torch.eye(len(wide), dtype=torch.float64)
            sizes = (4 * layer.in_features, 4 * layer.out_features)
            spectra.layers[name] = LayerSpectrum(name, *sizes, layer.side, wide, eye, eye)
    free = plan_of("params:30%", spectra)
    assert plan_of("params:30%", spectra, rank_buckets=2).error < 2 * free.error


def _refusal(budget, spectra):
    with pytest.raises(InputError) as error:
        plan_of(budget, spectra)
    return error.value


def test_include_and_exclude_keep_the_rest_dense_and_say_so():
    plan = plan_of("params:80%", include="fc", exclude=[r"blocks\.0"])
    for row in plan.layers:
        if "fc" not in row.name or "blocks.0" in row.name:
            assert row.rank is None and "include/exclude" in row.reason
    for bad in ({"include": "("}, {"include": "nothing"}, {"include": "fc", "exclude": "fc"}):
        with pytest.raises(InputError):
            plan_of("params:80%", **bad)


def test_ranks_by_hand_are_taken_as_they_are():
    plan = plan_of(None, ranks={"blocks.0.fc1": 31, "blocks.2.qkv": 1})
    assert plan.ranks == {"blocks.0.fc1": 31, "blocks.2.qkv": 1}
    assert plan_of(None, ranks={"blocks.0.fc1": np.int64(8)}).ranks == {"blocks.0.fc1": 8}
    with pytest.raises(InputError, match="does not go with"):
        plan_of(None, ranks={"blocks.0.fc1": 8}, include="fc1")
    with pytest.raises(InputError, match="over the budget"):
        plan_of("params:50%", ranks={"blocks.0.fc1": 1})
    for bad in ({"x": 3}, {"blocks.0.fc1": 0}, {"blocks.0.fc1": 33}, {"blocks.0.fc1": 2.5}, {"blocks.0.fc1": True}):
        with pytest.raises(InputError):
            plan_of(None, ranks=bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"rank_step": 0},
        {"min_rank": 0},
        {"rank_buckets": 0},
        {"rank_buckets": 2, "uniform": True},
        {"ranks": {}, "uniform": True},
    ],
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(InputError):
        plan_of("params:60%", **bad)
    with pytest.raises(InputError, match="budget"):
        plan_of(None)


def test_reasons_say_why_a_layer_stays_dense():
    reasons = {row.reason for row in plan_of("params:90%", rank_step=16).layers}
    assert any("worth its cost" in reason for reason in reasons)
    assert any("break-even (16)" in reason for reason in reasons)  # proj 32x32 breaks even at 16
    table = str(plan_of("params:60%"))
    assert "blocks.0.qkv" in table and "kept)" in table


def test_a_centred_layer_without_bias_pays_for_the_bias_it_gains():
    spectra = spectra_of(centred=True)
    plan = plan_of("params:60%", spectra, has_bias=False)
    gained = sum(row.out_features for row in plan.layers if row.rank is not None)
    weights = sum(row.params for row in plan.layers)
    assert plan.params_kept == OUTSIDE + weights + gained <= 0.6 * plan.params


def test_damaged_plans_are_refused():
    body = plan_of("params:60%").to_dict()
    for change in ({"schema": 99}, {"layers": 3}, {"layers": [{"name": "x"}]}):
        with pytest.raises(InputError):
            Plan.from_dict({**body, **change})
    body["layers"][0]["rank"] = 10**6
    with pytest.raises(InputError, match="rank"):
        Plan.from_dict(body)
    for text in ("", "{", "[1]", "[" * 100_000):
        with pytest.raises(InputError):
            Plan.from_json(text)


def test_uniform_ranks_share_alike():
    plan = plan_of("params:60%", uniform=True, rank_step=1)
    shares = [row.params / (row.in_features * row.out_features) for row in plan.layers]
    assert np.ptp(shares) < 0.08
