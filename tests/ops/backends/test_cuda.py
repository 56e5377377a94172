"""The CUDA candidates of lowrank_mlp and lowrank_linear: what they refuse, and what they hand to the kernels."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close_to

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.backends import cuda, native
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers import lowrank_linear, lowrank_mlp

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))
import emulated_lowrank as emulated

BF16 = torch.bfloat16
GPU = torch.device("cuda", 0)


def key(**changes):
    fields = {"M": 197, "K": 768, "D": 3072, "N": 768, "r1": 128, "r2": 128, "dtype": BF16, "device": GPU}
    return lowrank_mlp.Key(**{**fields, **changes})


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose GPU is the emulation: kernels run on tensors of the CPU. Gives the calls."""
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler that knows _Float16")
    calls = []

    def call(name, *args, device):
        calls.append(args)
        matrices, (b1, b2, y, M, K, D, N, r1, r2, act, fp16, given) = args[:6], args[6:]
        assert all(m is None or (m[0] % 16 == 0 and m[1] % 8 == 0) for m in matrices) and y % 16 == 0
        told = ctypes.create_string_buffer(500)
        matrices = (emulated.Matrix() if m is None else emulated.Matrix(*m) for m in matrices)
        params = emulated.Params(*matrices, b1 or None, b2 or None, y, M, K, D, N, r1, r2, act, fp16)
        plan = (ctypes.c_int * 5)(*(given or emulated.planned(M, K, D, N, r1, r2)[0]))
        arguments = ctypes.byref(params), plan, ctypes.byref(ctypes.c_double()), 0, told, len(told)
        emulated.library().emulate(*arguments)
        assert not told.value, told.value

    def plan(M, K, D, N, r1, r2, residual, device):
        return (*emulated.planned(M, K, D, N, r1, r2)[0], 1.0)

    module = SimpleNamespace(lowrank_sm90=None, lowrank_sm90_plan=plan, fp8_linear_sm90=None, fp8_mlp_sm90=None)
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: None)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    monkeypatch.setattr(native, "device_index", lambda device: 0)
    monkeypatch.setattr(native, "cuda", lambda: module)
    monkeypatch.setattr(native, "cuda_call", call)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args, **kw: empty(self, *args, **kw).fill_(torch.nan))
    registry._chosen.clear()
    yield calls
    registry._chosen.clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "x is torch.float32, the kernels multiply bfloat16 and float16"),
        ({"r1": None}, "fc1 is dense"),
        ({"r2": None}, "fc2 is dense"),
        ({"r1": 100}, "r1=100, TMA moves rows of a multiple of 16 bytes: expected a multiple of 8"),
        ({"r2": 264}, "r2=264, sums are held in registers: expected at most 256"),
        ({"K": 0}, "K=0"),
        ({"D": 3074}, "D=3074"),
        ({"N": 1001}, "N=1001"),
        ({"M": 2**30 + 1}, "expected at most"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(changes, reason):
    assert reason in cuda.shape_objection(key(**changes))


def test_what_fits():
    assert cuda.shape_objection(key()) is None and cuda.shape_objection(key(M=None, r1=8, r2=256)) is None
    assert cuda.shape_objection(lowrank_linear.Key(1, 768, 1000, 64, dtype=torch.float16, device=GPU)) is None
    assert "r=300" in cuda.shape_objection(lowrank_linear.Key(1, 768, 1000, 300, dtype=BF16))


def test_devices(monkeypatch):
    assert cuda.device_objection(torch.device("cpu")) is not None
    monkeypatch.setattr(native, "cuda_why_not", lambda device: None)
    monkeypatch.setattr(native, "capability", lambda device: 80)
    assert "compute capability 8.0" in cuda.device_objection(GPU)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    monkeypatch.setattr(native, "cuda", lambda: SimpleNamespace())
    assert "built without sm_90a" in cuda.device_objection(GPU)


@pytest.mark.parametrize(("op", "name"), [("lowrank_mlp", "cuda.sm90"), ("lowrank_linear", "cuda.cluster")])
def test_never_chosen_by_default(hopper, op, name):
    shape = {"M": 197, "K": 64, "N": 64, "dtype": BF16}
    shape |= {"r": 64} if op == "lowrank_linear" else {"D": 128, "r1": 64, "r2": 64}
    told = ops.explain(op, ceilings=H200, **shape)
    row = next(row for row in told.rows if row.candidate == name)
    assert told.chosen != name and row.runs and row.why.endswith("never ran on real hardware") and row.ran_on == ()
    assert row.floor_us > 0


def test_not_here_says_why(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = [torch.randn(8, 8, dtype=BF16) for _ in range(3)]
    with pytest.raises(InputError, match=r"cuda\.cluster"):
        lowrank_linear.lowrank_linear(*args)


def tensors(*shapes):
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(BF16) for shape in shapes]


@pytest.mark.parametrize("rows", [(), (0, 3), (1,), (2, 5, 17)], ids=str)
def test_mlp(hopper, monkeypatch, rows):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = tensors((*rows, 72), (56, 72), (200, 56), (200,), (64, 200), (104, 64), (104,), (*rows, 104))
    y = lowrank_mlp.lowrank_mlp(*args)
    assert len(hopper) == (0 not in rows) and y.is_contiguous()
    assert_close_to(y, lowrank_mlp.reference(*args), lowrank_mlp.reference(*(arg.double() for arg in args)))


def test_linear(hopper, monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = tensors((3, 21, 264), (40, 264), (136, 40), (136,), (3, 21, 136))
    exact = lowrank_linear.reference(*(arg.double() for arg in args), "gelu")
    y = lowrank_linear.lowrank_linear(*args, "gelu")
    assert len(hopper) == 1
    assert_close_to(y, lowrank_linear.reference(*args, "gelu"), exact)


def test_what_tma_does_not_take_is_copied(hopper, monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = tensors((21, 72), (56, 72), (200, 56), (200,), (64, 200), (104, 64), (104,))
    whole = lowrank_mlp.lowrank_mlp(*args)
    nan = torch.full((21, 72), torch.nan, dtype=BF16)
    layouts = {
        "transposed": args[0].mT.contiguous().mT,
        "every second column": torch.stack([args[0], nan], 2).flatten(1)[:, ::2],
        "rows apart": torch.cat([args[0], nan], 1)[:, :72],
        "rows oddly apart": torch.cat([args[0], nan[:, :3]], 1)[:, :72],
        "unaligned": torch.cat([nan[0, :1], args[0].flatten()])[1:].view(21, 72),
    }
    for name, x in layouts.items():
        assert torch.equal(lowrank_mlp.lowrank_mlp(x, *args[1:]), whole), name
    odd = torch.cat([args[3][:1], args[3]])[1:]
    assert torch.equal(lowrank_mlp.lowrank_mlp(*args[:3], odd, *args[4:]), whole)
    one = lowrank_mlp.lowrank_mlp(args[0][:1].expand(5, 72), *args[1:])
    assert torch.equal(one, whole[:1].expand(5, 104))


def test_floors_of_a_vit_b():
    """One wave of 66 clusters of two at 64 images, two of single CTAs at 256: docs/kernels/lowrank_mlp.md."""
    cluster = cuda.planned_floor(key(M=12608), (128, 3, 2, 66, 1, 0.0), H200)
    single = cuda.planned_floor(key(M=50432), (128, 3, 1, 132, 1, 0.0), H200)
    assert cluster == pytest.approx(34.7, abs=0.1) and single == pytest.approx(126.1, abs=0.2)
    assert single > lowrank_mlp.roofline(key(M=50432), H200).floor_us
