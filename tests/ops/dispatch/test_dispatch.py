"""Dispatch: what is taken, what is not, and that it always says why."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fake_kernels import fake_kernel

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.dispatch import floors, measured, registry
from vitlr.ops.dispatch.ceilings import H100, H200
from vitlr.ops.layers.fp8_chain import Key as Chain
from vitlr.ops.layers.lowrank_linear import Key

SMALL, LARGE = Key(4, 32, 48, 8), Key(4096, 32, 48, 8)


@pytest.fixture(autouse=True)
def only_the_reference(monkeypatch):
    """No override, and none of the kernels that come with the package."""
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    op = registry._ops["lowrank_linear"]
    monkeypatch.setattr(op, "candidates", op.candidates[:1])
    registry._chosen.clear()
    yield
    registry._chosen.clear()


def chosen(key=SMALL):
    return ops.select("lowrank_linear", key).name


def test_the_reference_runs_where_there_is_nothing_else():
    assert ops.candidates("lowrank_linear")[0].name == "torch"
    assert chosen() == "torch"


def test_a_registered_candidate_is_taken_and_given_back():
    with fake_kernel("lowrank_linear"):
        assert chosen() == "fake"
    assert chosen() == "torch"


def test_the_newest_that_supports_the_shape_wins():
    with (
        fake_kernel("lowrank_linear", name="old"),
        fake_kernel("lowrank_linear", lambda key: None if key.M >= 1024 else "too few rows", name="new"),
    ):
        assert (chosen(SMALL), chosen(LARGE)) == ("old", "new")


def test_a_candidate_that_does_not_pay_or_never_ran_is_left_out_but_can_be_asked_for(monkeypatch):
    with fake_kernel("lowrank_linear", worth=lambda key: "slower here"):
        assert chosen() == "torch"
        monkeypatch.setenv("VITLR_BACKEND", "fake")
        assert chosen() == "fake"
    monkeypatch.delenv("VITLR_BACKEND")
    with fake_kernel("lowrank_linear", name="triton", ran_on=()):
        assert chosen() == "torch"
        monkeypatch.setenv("VITLR_BACKEND", "triton")
        assert chosen() == "triton"


def test_the_override_prefers_the_good_candidate_of_its_back_end(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "triton")
    with (
        fake_kernel("lowrank_linear", name="triton.tried"),
        fake_kernel("lowrank_linear", name="triton.untried", ran_on=()),
    ):
        assert chosen() == "triton.tried"
    with (
        fake_kernel("lowrank_linear", name="triton.fast", ran_on=()),
        fake_kernel("lowrank_linear", name="triton.slow", ran_on=(), worth=lambda key: "slower here"),
    ):
        assert chosen() == "triton.fast"


def test_the_override_prefers_what_pays(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "triton")
    with (
        fake_kernel("lowrank_linear", name="triton.good", ran_on=()),
        fake_kernel("lowrank_linear", name="triton.slow", ran_on=(), worth=lambda key: "slower here"),
    ):
        assert chosen() == "triton.good"


ROW = {"op": "lowrank_linear", "key": measured.describe(LARGE), "us": {"torch": 5.0, "old": 3.0, "new": 4.0}}


@pytest.fixture
def measured_here(monkeypatch):
    """Rows measured on this device, which the test gives."""
    rows = [ROW, {**ROW, "key": {**ROW["key"], "M": 2048}, "us": {"torch": 1.0, "old": 2.0, "new": 3.0}}]
    monkeypatch.setattr(measured, "table", lambda device: tuple(rows))
    return rows


def test_the_fastest_measured_nearby_wins(measured_here):
    with fake_kernel("lowrank_linear", name="old"), fake_kernel("lowrank_linear", name="new"):
        assert chosen(LARGE) == chosen(LARGE._replace(M=5000)) == "old"
        assert chosen(LARGE._replace(M=2000)) == "torch"
        for other in (SMALL, LARGE._replace(dtype=torch.bfloat16), LARGE._replace(act="gelu"), LARGE._replace(M=None)):
            assert chosen(other) == "new"  # nothing like it was measured: the newest
        told = ops.explain("lowrank_linear", **LARGE._asdict())
        assert [row.measured_us for row in told.rows] == [5.0, 3.0, 4.0]
        assert "3.0 µs" in str(told) and "old is preferred" in str(told)


def test_a_measured_time_outweighs_an_estimate(measured_here):
    with fake_kernel("lowrank_linear", name="old", worth=lambda key: "its floor is too high"):
        assert chosen(LARGE) == "old"  # measured as faster than torch
        assert chosen(LARGE._replace(M=2000)) == chosen(SMALL) == "torch"


def test_without_measurements_the_lowest_floor_wins(monkeypatch):
    monkeypatch.setattr(registry, "ceilings_of", lambda device: H200)
    floor = {"old": 10.0, "new": 20.0}
    with fake_kernel("lowrank_linear", name="old"), fake_kernel("lowrank_linear", name="new"):
        assert chosen(LARGE) == "new"  # without floors of their own
        every = registry._ops["lowrank_linear"].candidates
        for index in (1, 2):
            us = floor[every[index].name]
            every[index] = dataclasses.replace(every[index], floor=lambda key, limits, us=us: us)
        every[0] = dataclasses.replace(every[0], floor=lambda key, limits: 30.0)
        registry._chosen.clear()
        assert chosen(LARGE) == "old"
        assert chosen(LARGE._replace(M=None)) == "new"


@pytest.mark.parametrize(
    ("card", "limits"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA H100 PCIe", None),  # less memory bandwidth, lower clocks: nobody measured it
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_ceilings_are_those_of_the_very_card(monkeypatch, card, limits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert registry.ceilings_of("cuda") is limits
    assert registry.ceilings_of("cpu") is None


def test_a_last_wave_takes_as_long_as_a_full_one():
    limits, bf16 = H200, torch.bfloat16
    full = 1e6 * 132e9 / 790e12  # µs of 132 programs of 1 GFLOP
    assert floors.in_waves(1e9, 132, 132, 1, bf16, limits) == pytest.approx(full)
    assert floors.in_waves(1e9, 99, 132, 1, bf16, limits) == pytest.approx(full)
    assert floors.in_waves(1e9, 133, 132, 1, bf16, limits) == pytest.approx(2 * full)
    assert floors.in_waves(1e9, 0, 132, 4.3e6, bf16, limits) == pytest.approx(1.0), "what moves its bytes longer"
    assert floors.in_waves(1e9, 1, 132, 1, torch.float64, limits) is None


def test_separate_products_write_and_read_what_is_between_them():
    limits, fp16 = H200, torch.float16
    rows, moved = 1000, 1000 * (8 + 2) + 8 * 2 + 1000 * (2 + 4) + 2 * 4
    assert floors.separate(rows, [(8, 4, 2)], 3, fp16, limits) == pytest.approx(2e6 * (moved + 3 * rows) / 4.3e12)
    assert floors.separate(rows, [(8, 4, None)], 0, fp16, limits) == pytest.approx(2e6 * (12 * rows + 32) / 4.3e12)
    assert floors.separate(rows, [(8, 4, 2)], 0, torch.float64, limits) is None


def test_every_shipped_table_is_of_known_ops():
    for path in measured.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        assert measured.file_name(table["device"]) == path.stem
        for row in table["rows"]:
            fields = set(registry._ops[row["op"]].key_type._fields) - {"device"}
            assert set(row["key"]) == fields and all(us > 0 for us in row["us"].values())


def test_a_back_end_can_be_asked_for_in_one_place(monkeypatch):
    with fake_kernel("lowrank_linear"):
        kernel = chosen()
        with registry.backend("torch"):
            assert chosen() == "torch" and "chosen: VITLR_BACKEND=torch" in str(
                ops.explain("lowrank_linear", **SMALL._asdict())
            )
            monkeypatch.setenv("VITLR_BACKEND", kernel)
            assert chosen() == "torch"  # the nearer word counts
        assert chosen() == kernel != "torch"
        with pytest.raises(ZeroDivisionError), registry.backend("torch"):
            raise ZeroDivisionError
        assert chosen() == kernel


def test_torch_can_be_forced(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "torch")
    with fake_kernel("lowrank_linear"):
        assert chosen() == "torch"


@pytest.mark.parametrize(
    ("backend", "message"),
    [("vulkan", "unknown back-end"), ("cuda", "no such candidate"), ("triton", "needs a CUDA device")],
)
def test_an_override_that_cannot_be_met_is_an_error(monkeypatch, backend, message):
    monkeypatch.setenv("VITLR_BACKEND", backend)
    x, B, A = torch.randn(4, 32), torch.randn(8, 32), torch.randn(48, 8)
    with fake_kernel("lowrank_linear", lambda key: "needs a CUDA device", name="triton"):
        with pytest.raises(InputError, match=message):
            chosen()
        with pytest.raises(InputError, match=message):
            ops.lowrank_linear.lowrank_linear(x, B, A)


def test_explain_says_which_and_why():
    with fake_kernel("lowrank_linear", lambda key: "rank over 4" if key.r > 4 else None, name="triton.small"):
        told = ops.explain("lowrank_linear", M=12608, K=768, N=768, r=128, dtype=torch.float16, ceilings=H200)
        assert told.chosen == "torch"
        reasons = {row.candidate: (row.runs, row.why) for row in told.rows if row.candidate != "cpu"}
        assert reasons == {"torch": (True, "chosen"), "triton.small": (False, "rank over 4")}
        text = str(told)
        assert "rank over 4" in text and "M=12608" in text and "floor 9.1 µs" in text
        small = ops.explain("lowrank_linear", M=12608, K=768, N=768, r=4, device="cpu")
        assert small.chosen == "triton.small" and small.roofline.floor_us is None
        assert "unknown" in str(small) and "triton.small is preferred" in str(small)


def test_explain_names_the_override_and_what_never_ran(monkeypatch):
    with fake_kernel("lowrank_linear", name="triton", ran_on=()):
        assert "never ran on real hardware" in str(ops.explain("lowrank_linear", **SMALL._asdict()))
        monkeypatch.setenv("VITLR_BACKEND", "triton")
        assert "chosen: VITLR_BACKEND=triton" in str(ops.explain("lowrank_linear", **SMALL._asdict()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.explain("lowrank_linear", M=1, K=2, N=3), "missing: r"),
        (lambda: ops.explain("lowrank_linear", M=1, K=2, N=3, r=1, rows=2), "unknown: rows"),
        (lambda: ops.explain("convolution", M=1), "known are .*lowrank_linear"),
        (lambda: ops.register("lowrank_linear", ops.candidates("lowrank_linear")[0]), "already has"),
        (lambda: ops.unregister("lowrank_linear", "torch"), "no kernel 'torch'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_memory_of_decisions_is_bounded():
    with fake_kernel("lowrank_linear"):
        for M in range(5000):
            ops.select("lowrank_linear", SMALL._replace(M=M))
        assert len(registry._chosen) <= 4096


def test_chains_are_as_far_apart_as_their_widths(monkeypatch):
    key = Chain(1000, (64, 256, 64), ("gelu", "none"), dtype=torch.bfloat16, device=torch.device("cuda"))
    written = json.loads(json.dumps(measured.describe(key._replace(widths=(64, 128, 64)))))  # lists, as a file has them
    rows = ({"op": "fp8_chain", "key": written, "us": {"torch": 3.0}},)
    monkeypatch.setattr(measured, "table", lambda device: rows)
    assert measured.nearest("fp8_chain", key).us == {"torch": 3.0}, "one octave"
    assert measured.nearest("fp8_chain", key._replace(widths=(64, 512, 64))) is None, "two"
    assert measured.nearest("fp8_chain", key._replace(widths=(64, 64), acts=("none",))) is None
    assert measured.nearest("fp8_chain", key._replace(acts=("relu", "none"))) is None
