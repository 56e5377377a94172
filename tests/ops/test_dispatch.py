"""Dispatch: what is taken, what is not, and that it always says why."""

from __future__ import annotations

import pytest
import torch
from fake_kernels import fake_kernel

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops import _dispatch
from vitlr.ops.lowrank_linear import Key

SMALL, LARGE = Key(4, 32, 48, 8), Key(4096, 32, 48, 8)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)


def chosen(key=SMALL):
    return ops.select("lowrank_linear", key).name


def test_the_reference_runs_where_there_is_nothing_else():
    assert [candidate.name for candidate in ops.candidates("lowrank_linear")] == ["torch"]
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
        told = ops.explain(
            "lowrank_linear", M=12608, K=768, N=768, r=128, dtype=torch.bfloat16, ceilings=_dispatch.H200
        )
        assert told.chosen == "torch"
        reasons = {row.candidate: (row.runs, row.why) for row in told.rows}
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
        assert len(_dispatch._chosen) <= 4096
