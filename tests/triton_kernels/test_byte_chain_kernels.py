"""Chains of bytes by Triton: e4m3 with scales of rows, int8 with steps of columns; values, ragged shapes, refusals."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from int8_steps import columns, normal_and_unambiguous, step, unambiguous
from tolerance import assert_close_to

from vitlr import ops
from vitlr.ops.backends.triton import byte_chains as candidates
from vitlr.ops.dispatch.ceilings import H100, H200
from vitlr.ops.layers import fp8_chain, int8_chain
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.triton_kernels import byte_chains, byte_linear, byte_rows
from vitlr.triton_kernels.byte_linear import Rows
from vitlr.triton_kernels.targets import TARGETS, Unsupported

FP8 = torch.float8_e4m3fn
SM80, SM90 = TARGETS["sm_80"], TARGETS["sm_90"]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the interpreter")


@pytest.fixture(autouse=True)
def unwritten(poison):
    for module in (byte_rows, byte_linear, byte_chains):
        poison(module)


def linears(*widths, bias=True):
    torch.manual_seed(sum(widths))
    made = [(torch.randn(N, K) / K**0.5, torch.randn(N) if bias else None) for K, N in pairwise(widths)]
    return [fp8_chain.step_of(*parts) for parts in made]


def fp8_args(M, widths, acts, dtype, device, residual=False, norm=False, bias=True):
    steps = linears(*widths, bias=bias)
    x, added = torch.randn(M, widths[0]).to(dtype), torch.randn(M, widths[-1]).to(dtype) if residual else None
    gamma_beta = [(1 + 0.1 * torch.randn(widths[0])).to(dtype), torch.randn(widths[0]).to(dtype)] if norm else []
    args = [x, *columns(steps), added, list(acts), gamma_beta, 1e-5]
    moved = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return [[moved(t) for t in arg] if isinstance(arg, list) else moved(arg) for arg in args]


def exact(args):
    """What is meant: no row rounded, in fp64."""
    doubled = [t.double() for t in args[7]]
    residual = None if args[5] is None else args[5].double()
    return fp8_chain.reference(args[0].double(), *args[1:5], residual, args[6], doubled, args[8])


def check(args):
    assert_close_to(byte_chains.run_fp8(*args), fp8_chain.reference(*args), exact(args))


@pytest.mark.parametrize(
    ("M", "widths", "acts"),
    [
        (70, (64, 130, 48), ("gelu", "none")),
        (1, (100, 90, 33), ("silu", "none")),
        (63, (48, 20, 96, 20, 48), ("none", "gelu", "none", "none")),
        (197, (96, 70), ("gelu",)),
        (130, (37, 300, 37), ("gelu_tanh", "none")),
        (64, (32, 256, 32), ("sigmoid", "relu")),
    ],
)
def test_fp8_values(M, widths, acts, dtype, device):
    check(fp8_args(M, widths, acts, dtype, device, residual=M != 63, norm=M != 1, bias=M != 64))


def test_bytes_and_scales_are_those_of_the_specification(device):
    """Bit for bit, but where a last bit of fp32 lies between two neighbours: one in a hundred at the very most."""
    x = torch.randn(150, 200, device=device)
    (W, scale, b, reach), (V, _, _, _) = (part._replace(**_on(part, device)) for part in linears(200, 300, 40))
    rows = Rows(*byte_rows.fp8(x, None, 0.0))
    s = fp8_chain.scale_of(x.abs().amax(1))
    assert torch.equal(rows.scale, s) and torch.equal(rows.q.float(), (x / s[:, None]).to(FP8).float())
    torch.testing.assert_close(rows.squares[:, 0], x.square().sum(1))
    for act in ("relu", "gelu"):
        hidden = byte_linear.to_fp8(rows, W, scale, b, reach, act, torch.float32)
        p = (rows.q.float() @ W.float().mT) * s[:, None] * scale + b
        h, most = ACTIVATIONS[act][0](p), x.norm(dim=1) * reach[0] + reach[1]
        assert torch.equal(hidden.scale, fp8_chain.scale_of(most)), "the same for all tiles of a row"
        assert (h.abs().amax(1) <= 448 * hidden.scale).all(), "nothing is cut off"
        same = (hidden.q.float() == (h / hidden.scale[:, None]).to(FP8).float()).float().mean()
        assert same > (0.9999 if act == "relu" else 0.97)
        torch.testing.assert_close(hidden.squares.sum(1), h.square().sum(1), rtol=1e-3, atol=1e-3)
    assert V.dtype == FP8


def _on(step, device):
    return {name: t.to(device) for name, t in step._asdict().items()}


@on_cpu
def test_e4m3_by_hand_is_torchs():
    values = torch.cat([torch.linspace(-448, 448, 4096), torch.logspace(-13, 8.8, 4096, base=2.0), torch.zeros(1)])
    for some in values.split(1024):
        x = torch.cat([some, torch.full((1,), 416.0)])[None]  # a scale of 1
        q, scale, _ = byte_rows.fp8(x, None, 0.0)
        assert scale.tolist() == [1.0] or some.abs().max() > 416
        assert torch.equal(q.float() * scale, (x / scale[:, None]).to(FP8).float() * scale)


@pytest.mark.parametrize("size", [1e-15, 1e-3, 1.0, 1e4, 1e15])
def test_scales_hold_rows_of_any_size(size, device):
    args = fp8_args(5, (64, 96, 40), ("none", "none"), torch.float32, device, bias=False)
    args[0] *= size
    got, want = byte_chains.run_fp8(*args), exact(args)
    assert (got.double() - want).norm() <= 0.06 * want.norm()


def test_a_row_of_zeros_is_the_biases(device):
    args = fp8_args(3, (32, 48, 20), ("relu", "none"), torch.float32, device)
    args[0].zero_()
    check(args)


def test_nan_and_inf_stay_in_their_row(device):
    args = fp8_args(9, (40, 70, 24), ("gelu", "none"), torch.float32, device)
    clean = byte_chains.run_fp8(*args)
    args[0][2, 3], args[0][5, 7] = float("nan"), float("inf")
    y = byte_chains.run_fp8(*args)
    assert not y[[2, 5]].isfinite().any()
    others = [row for row in range(9) if row not in (2, 5)]
    assert torch.equal(y[others], clean[others])


def test_the_same_result_every_time_and_for_any_strides(device):
    args = fp8_args(40, (64, 96, 24), ("gelu", "none"), torch.float32, device, residual=True)
    first = byte_chains.run_fp8(*args)
    assert torch.equal(first, byte_chains.run_fp8(*args))
    args[0] = args[0].mT.contiguous().mT
    args[1] = [W.view(torch.uint8).repeat_interleave(2, 1)[:, ::2].view(FP8) for W in args[1]]
    args[5] = args[5].repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(first, byte_chains.run_fp8(*args))
    shaped = args[0].reshape(2, 4, 5, 64)
    args[0], args[5] = shaped, args[5].reshape(2, 4, 5, 24)
    assert torch.equal(first.view(2, 4, 5, 24), byte_chains.run_fp8(*args))


@pytest.mark.parametrize(("more", "acts"), [(0, ("gelu", "none")), (5, ("silu", "none")), (3, ("none",))])
def test_int8_values(more, acts, dtype, device):
    """The chain of the CPU, wide channels, zero points and all."""
    first, second = step(70, 90, more), step(90, 33, more)
    steps = [first, second][: len(acts)]
    x = unambiguous(67, first, dtype)
    residual = torch.randn(67, len(steps[-1].codes)).to(dtype)
    args = [x, *columns(steps), residual, list(acts)]
    want = int8_chain.reference(*args)
    got = candidates._run_int8(*args)
    close = (got.double() - want.double()).abs() <= (0.02 if len(acts) > 1 else 1e-5) * (1 + want.double().abs())
    assert close.float().mean() > (0.98 if dtype.itemsize == 2 else 0.9999)
    exactly = int8_chain.reference(x.double(), *args[1:6], args[6], residual.double(), list(acts))
    if len(acts) == 1:  # nothing between two steps that a last bit could move
        assert_close_to(got, want, exactly)


def test_int8_after_a_norm(device):
    first = step(64, 40, 4)
    gamma, beta = 1 + 0.1 * torch.randn(64), 0.1 * torch.randn(64)
    x = normal_and_unambiguous(9, first, gamma, beta, 1e-5)
    args = [x, *columns([first]), None, ["none"], [gamma, beta], 1e-5]
    exactly = int8_chain.reference(x.double(), *args[1:9], [gamma.double(), beta.double()], 1e-5)
    assert_close_to(candidates._run_int8(*args), int8_chain.reference(*args), exactly)


def test_int8_codes_that_change_are_seen():
    first = step(32, 20)
    x = unambiguous(5, first)
    args = [x, *columns([first]), None, ["none"]]
    candidates._run_int8(*args)
    first.codes.neg_()
    torch.testing.assert_close(candidates._run_int8(*args), int8_chain.reference(*args), rtol=1e-4, atol=1e-4)


def test_no_rows(device):
    args = fp8_args(0, (32, 20), ("none",), torch.float32, device)
    assert byte_chains.run_fp8(*args).shape == (0, 20)
    args[0] = args[0].reshape(3, 0, 32)
    assert byte_chains.run_fp8(*args).shape == (3, 0, 20)
    first = step(32, 20)
    assert candidates._run_int8(torch.zeros(0, 32), *columns([first]), None, ["none"]).shape == (0, 20)


def test_through_the_ops(device, triton_backend):
    args = fp8_args(30, (40, 70, 24), ("gelu", "none"), torch.float32, device, residual=True)
    # Not test_schema: it compares inputs before and after, which torch cannot do in e4m3.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.vitlr.fp8_chain.default, tuple(args), test_utils=utils)
    assert torch.equal(torch.ops.vitlr.fp8_chain.default(*args), byte_chains.run_fp8(*args))
    told = ops.explain("fp8_chain", M=30, widths=(40, 70, 24), acts=("gelu", "none"), dtype=torch.float32)
    assert told.chosen == "triton.bytes"
    told = ops.explain("int8_chain", M=30, widths=(40, 70, 24), acts=("gelu", "none"), dtype=torch.float32)
    assert told.chosen == "triton.bytes"


def test_without_an_override_nothing_untried_runs(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    told = ops.explain("fp8_chain", M=30, widths=(40, 24), acts=("none",), dtype=torch.float32)
    assert told.chosen == "torch" and "never ran on real hardware" in str(told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": SM80}, "sm_80 does not multiply e4m3, sm_89, sm_90"),
        ({"dtype": torch.float64}, "float64"),
        ({"widths": (9000, 20)}, "K = 9000, a row is held whole"),
        ({"target": dataclasses.replace(SM90, shared_memory=4096)}, "no tiles fit the 4096 bytes"),
    ],
)
def test_what_is_not_taken(change, message):
    given = {"widths": (768, 224, 3072), "dtype": torch.bfloat16, "target": SM90}
    assert byte_chains.fp8(**given)
    with pytest.raises(Unsupported, match=message):
        byte_chains.fp8(**{**given, **change})


def test_ampere_multiplies_int8():
    assert byte_chains.int8((768, 3072, 768), torch.bfloat16, SM80)


def test_tiles_by_shape():
    def tile(M, K, N, residual=False):
        return byte_linear.config(M, K, N, torch.bfloat16, FP8, SM90, residual)

    short, few, long = tile(12608, 224, 3072), tile(197, 224, 3072), tile(12608, 3072, 224)
    assert (short.BM, short.BN) == (128, 128) and (few.BM, few.BN) == (64, 64) and (long.BM, long.BN) == (128, 256)
    assert 2 * byte_linear.shared_memory(short) <= SM90.shared_memory, "two programs a processor"
    assert tile(12608, 3072, 768).BN == 256 and tile(12608, 3072, 768, residual=True).BN == 128
    assert tile(12608, 3072, 700).BN == 256 and tile(12608, 3072, 640).BN == 128, "half of a wide tile would be empty"
    assert all(byte_linear.shared_memory(option) <= SM80.shared_memory for option in byte_linear.configs(SM80))


def test_floors_count_activations_and_whole_waves():
    key = fp8_chain.Key(12608, (768, 224, 3072, 224, 768), ("none", "gelu", "none", "none"), True, torch.bfloat16)
    plain = candidates.floor(key._replace(acts=("none",) * 4), H100, SM90)
    assert plain < candidates.floor(key, H100, SM90) < 86
    assert candidates.floor(key, H200, SM90) < candidates.floor(key, H100, SM90)
    assert fp8_chain.roofline(key, H100).floor_us < plain


def test_autotune_measures_once(device, monkeypatch, tmp_path):
    from vitlr.triton_kernels import tables

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    tables.measured.cache_clear()
    seen = []
    monkeypatch.setattr(tables, "_median", lambda function: seen.append(function()) or len(seen))
    options = [byte_linear.Config(32, 32, 32, 4, 2), byte_linear.Config(64, 32, 32, 4, 2)]
    monkeypatch.setattr(byte_linear, "configs", lambda target: options)
    args = fp8_args(9, (32, 64, 40), ("gelu", "none"), torch.float32, device)
    for _ in range(2):
        check(args)
    assert len(seen) == 4 and len(tables.measured(byte_linear.KERNEL)) == 2
    tables.measured.cache_clear()
