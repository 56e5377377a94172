"""`cuda.bytes` of `fp8_chain`: Triton's launches in the interpreter, the kernel for Hopper in its emulation."""

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
from vitlr.ops.backends import cuda, cuda_bytes, native
from vitlr.ops.backends.triton import byte_chains
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.ceilings import H100, H200
from vitlr.ops.layers import fp8_chain
from vitlr.triton_kernels.targets import TARGETS

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
import emulated_fp8 as emulated
from emulation import compiler
from test_byte_chain_kernels import exact, fp8_args

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the interpreter")


def key(*widths, device=GPU, dtype=torch.bfloat16):
    return fp8_chain.Key(12608, widths, ("none",) * (len(widths) - 1), dtype=dtype, device=device)


@pytest.fixture
def hopper(monkeypatch):
    """A machine whose GPU is interpreter and emulation. Gives the sizes (M, K, N) of the kernel's calls."""
    if compiler() is None:
        pytest.skip("no C++ compiler that knows _Float16")
    calls = []

    def call(name, q, W, y, M, K, N, act, parts, *vectors, device):
        assert name == "fp8_linear_sm90" and not any(address % 16 for address in (q, W, y))
        calls.append((M, K, N))
        *vectors, ctas = vectors
        sizes = emulated.Sizes(M, K, N, act, parts, *(address or None for address in vectors))
        told = ctypes.create_string_buffer(500)
        given = ctypes.byref(emulated.Matrices(q, W, y)), ctypes.byref(sizes)
        emulated.library().emulate(*given, ctas or 3, 0, told, len(told))
        assert not told.value, told.value.decode()

    module = SimpleNamespace(**dict.fromkeys(cuda.KERNELS))
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: None)
    monkeypatch.setattr(native, "capability", lambda device: 90)
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
    ("M", "widths", "acts", "taken"),
    [
        (70, (64, 144, 48), ("gelu", "none"), [(70, 64, 144)]),
        (63, (48, 32, 272, 16, 48), ("none", "gelu", "none", "none"), [(63, 32, 272)]),
        (200, (32, 64, 144, 32), ("silu", "gelu", "none"), [(200, 32, 64), (200, 64, 144)]),
    ],
)
def test_a_chain_in_which_the_kernel_takes_what_widens(hopper, monkeypatch, M, widths, acts, taken):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = fp8_args(M, widths, acts, torch.float32, CPU, residual=True, norm=True)
    y = torch.ops.vitlr.fp8_chain.default(*args)
    assert hopper == taken
    assert_close_to(y, fp8_chain.reference(*args), exact(args))


def test_opcheck(hopper, monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = fp8_args(20, (32, 144, 32), ("gelu", "none"), torch.float32, CPU, residual=True)
    utils = (
        "test_autograd_registration",
        "test_faketensor",
    )  # the others ask torch to multiply 8-bit floats elementwise
    torch.library.opcheck(torch.ops.vitlr.fp8_chain.default, args, test_utils=utils)
    assert hopper


def test_it_is_never_chosen_by_default(hopper):
    told = ops.explain(
        "fp8_chain", ceilings=H200, **key(768, 224, 3072, 224, 768, device=CPU, dtype=torch.float32)._asdict()
    )
    row = next(row for row in told.rows if row.candidate == "cuda.bytes")
    assert told.chosen != "cuda.bytes" and row.runs and row.why.endswith("never ran on real hardware")


@pytest.mark.parametrize(
    ("widths", "why"),
    [
        ((768, 224, 768), "no linear before the last widens"),
        ((768, 3072), "no linear before the last widens"),
        ((1024, 4096, 1024), "from at most 768 columns"),
        ((100, 400, 100), "in multiples of 16"),
    ],
)
def test_chains_in_which_it_has_nothing_to_do_are_left_to_triton(widths, why):
    assert why in cuda_bytes.objection(key(*widths))


def test_not_here_says_why(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    args = fp8_args(20, (32, 144, 32), ("gelu", "none"), torch.float32, CPU)
    with pytest.raises(InputError, match=r"cuda\.bytes"):
        torch.ops.vitlr.fp8_chain.default(*args)


def test_its_floor_is_that_of_its_tiles():
    """docs/kernels/eight_bits.md: 12 tiles a processor at r = 224, where Triton has 18 of two thirds the size."""
    call = key(768, 224, 3072, 224, 768)._replace(acts=("none", "gelu", "none", "none"))
    for limits in (H100, H200):
        ours, theirs = (
            cuda_bytes.floor(call, limits, TARGETS["sm_90"]),
            byte_chains.floor(call, limits, TARGETS["sm_90"]),
        )
        assert ours == pytest.approx(theirs, rel=0.05)
        left = byte_chains.floor(
            call, limits, TARGETS["sm_90"], leave=lambda i, K, N: i < 3 and cuda_bytes.widens(K, N)
        )
        assert left < theirs < ours + left
