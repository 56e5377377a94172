"""`cuda.mlp` of `fp8_chain`: Triton's launches in the interpreter, the kernel for Hopper in its emulation."""

from __future__ import annotations

import ctypes
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close_to

from vitlr import ops
from vitlr.ops.backends import cuda_bytes, cuda_mlp, native
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.ceilings import H100, H200
from vitlr.ops.layers import fp8_chain
from vitlr.triton_kernels.targets import TARGETS

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
import emulated_fp8_mlp as emulated
from emulation import compiler
from test_byte_chain_kernels import exact, fp8_args

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the interpreter")


def key(*widths, acts=None, device=GPU, dtype=torch.bfloat16):
    acts = acts or ("none",) * (len(widths) - 4) + ("gelu", "none", "none")
    return fp8_chain.Key(12608, widths, acts, dtype=dtype, device=device)


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose GPU is interpreter and emulation. Gives the sizes (M, r1, D, r2, N) of the kernel's calls."""
    if compiler() is None:
        pytest.skip("no C++ compiler that knows _Float16")
    calls = []

    def call(name, *given, device):
        assert name == "fp8_mlp_sm90" and not any(address % 16 for address in given[:5])
        matrices, y, sizes, rest = given[:4], given[4], given[5:13], given[13:]
        *vectors, residual, sums, flags, ctas = rest
        calls.append(sizes[:5])
        pointers = [address or None for address in (*vectors, residual, y, sums, flags)]
        packed = emulated.Sizes(*sizes, *pointers)
        told = ctypes.create_string_buffer(500)
        of = ctypes.byref(emulated.Matrices(*matrices)), ctypes.byref(packed)
        emulated.library().emulate(*of, ctas or 3, 0, told, len(told))
        assert not told.value, told.value.decode()

    room = lambda *sizes: emulated.room(*sizes[:5], sizes[5] or 3)  # noqa: E731
    names = ("lowrank_sm90", "fp8_linear_sm90", "fp8_mlp_sm90")
    module = SimpleNamespace(**dict.fromkeys(names), fp8_mlp_sm90_room=room)
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: None)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    monkeypatch.setattr(native, "device_index", lambda device: 0)
    monkeypatch.setattr(native, "cuda", lambda: module)
    monkeypatch.setattr(native, "cuda_call", call)
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **more):
        made = empty(self, *args, **more)
        made.view(torch.uint8).fill_(0x7F) if made.element_size() == 1 else made.fill_(torch.nan)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    registry._chosen.clear()
    yield calls
    registry._chosen.clear()


@pytest.mark.parametrize(
    ("M", "widths", "acts", "residual"),
    [
        (63, (48, 32, 272, 16, 48), ("none", "gelu", "none", "none"), True),
        (150, (32, 1040, 64, 48), ("silu", "none", "none"), False),
    ],
)
def test_a_chain_whose_last_three_linears_are_one_kernel(hopper, monkeypatch, M, widths, acts, residual):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = fp8_args(M, widths, acts, torch.float16, CPU, residual=residual, norm=True)
    y = torch.ops.vitlr.fp8_chain.default(*args)
    assert hopper == [(M, *widths[-4:])]
    assert_close_to(y, fp8_chain.reference(*args), exact(args))


def test_rows_that_do_not_lie_side_by_side(hopper):
    args = fp8_args(24, (32, 144, 32, 48), ("gelu", "none", "none"), torch.float16, CPU, residual=True)
    plain = cuda_mlp.run(*args)
    strided = [
        args[0].mT.contiguous().mT.unflatten(0, (2, 12)),
        *args[1:5],
        args[5].repeat_interleave(2, 1)[:, ::2],
        *args[6:],
    ]
    assert torch.equal(cuda_mlp.run(*strided).flatten(0, 1), plain)
    assert cuda_mlp.run(args[0][:0], *args[1:5], None, *args[6:]).shape == (0, 48)


def test_opcheck(hopper, monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = fp8_args(20, (32, 144, 32, 48), ("gelu", "none", "none"), torch.float16, CPU, residual=True)
    utils = (
        "test_autograd_registration",
        "test_faketensor",
    )  # the others ask torch to multiply 8-bit floats elementwise
    torch.library.opcheck(torch.ops.vitlr.fp8_chain.default, args, test_utils=utils)
    assert hopper


def test_it_is_never_chosen_by_default(hopper):
    asked = key(768, 224, 3072, 224, 768, device=CPU, dtype=torch.float16)
    told = ops.explain("fp8_chain", ceilings=H200, **asked._asdict())
    row = next(row for row in told.rows if row.candidate == "cuda.mlp")
    assert told.chosen != "cuda.mlp" and row.runs and row.why.endswith("never ran on real hardware")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (key(768, 224, 3072, 224, 768, dtype=torch.float32), "the kernel writes bfloat16 and float16"),
        (key(768, 3072, 768, acts=("gelu", "none")), "expected at least 3 linears"),
        (key(224, 3072, 224, 768, acts=("gelu", "relu", "none")), "the last two of them without activation"),
        (key(768, 288, 3072, 224, 768), "ranks 288 and 224, expected at most 256"),
        (key(768, 224, 3072, 224, 1000), "expected multiples of 16"),
    ],
)
def test_chains_that_it_does_not_take_are_left_to_others(asked, why):
    assert why in cuda_mlp.objection(asked)


def test_its_floor_is_below_that_of_launches_which_write_the_hidden():
    """docs/kernels/eight_bits.md: 18 units a processor at M = 12608, none left over."""
    call = key(768, 224, 3072, 224, 768)
    for limits in (H100, H200):
        ours, theirs = (found.floor(call, limits, TARGETS["sm_90"]) for found in (cuda_mlp, cuda_bytes))
        products = 1e6 * 12608 * sum(2 * K * N for K, N in pairwise(call.widths)) / limits.flops_per_s[fp8_chain.FP8]
        assert products < ours < theirs
