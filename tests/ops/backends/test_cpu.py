"""The CPU candidates through their ops: chosen where they pay, right in every mode, and the same from many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tolerance import assert_close_to
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitlr import ops
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear
from vitlr.ops.backends import native
from vitlr.ops.layers import lowrank_mlp, lowrank_residual_linear
from vitlr.ops.layers.lowrank_linear import lowrank_linear

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")
fast = pytest.mark.skipif(native.best_isa() == "portable", reason="without AVX2 nothing is chosen")
BASE = {"K": 768, "D": 3072, "N": 768, "r1": 128, "r2": 128}


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cpu")


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)


@fast
def test_an_mlp_of_vit_b_is_chosen_and_a_tiny_one_is_not():
    for dtype in (torch.float32, torch.bfloat16):
        told = ops.explain("lowrank_mlp", M=1576, dtype=dtype, **BASE)
        outdone = dtype == torch.bfloat16 and native.best_isa() == "amx_int8"
        assert told.chosen == ("torch" if outdone else "cpu") and ("in tiles of AMX" in str(told)) == outdone
    told = ops.explain("lowrank_mlp", M=4, K=24, D=40, N=16, r1=6, r2=5)
    assert told.chosen == "torch" and "a call costs more" in str(told)


@fast
def test_an_mlp_whose_rank_is_so_large_that_torch_is_faster_is_left_to_it():
    large = ops.explain("lowrank_mlp", M=1576, **{**BASE, "r1": 512, "r2": 512})
    assert large.chosen == "torch" and "above r = 256" in str(large)
    few = ops.explain("lowrank_mlp", M=197, **BASE)
    assert few.chosen == ("torch" if native.best_isa() == "amx_int8" else "cpu")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("dtype", torch.float16, "it takes fp32 and bf16"),
        ("device", "cuda", "runs on the CPU"),
        ("r1", 0, "a size is 0"),
    ],
)
def test_what_it_does_not_take_is_told(monkeypatch, field, value, reason):
    shape = {"M": 197, **BASE, field: value}
    assert reason in str(ops.explain("lowrank_mlp", **shape))
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    with pytest.raises(InputError, match=reason):
        ops.explain("lowrank_mlp", **shape)


def test_residuals_that_are_no_integers_are_left_to_torch():
    told = ops.explain("lowrank_residual_linear", M=197, K=768, N=768, r=32, form="fp8", group_size=64)
    assert told.chosen == "torch" and "codes of int8 and int4, R is fp8" in str(told)


def test_opcheck(forced):
    args = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 8), (4, 8), (6, 4), (6,))]
    torch.library.opcheck(torch.ops.vitlr.lowrank_linear.default, (*args, None, "gelu"))
    w = [
        torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 8), (4, 8), (12, 4), (12,), (5, 12), (7, 5), (7,))
    ]
    torch.library.opcheck(torch.ops.vitlr.lowrank_mlp.default, (*w, None, "silu"))


def test_gradients_are_those_of_torch(forced, monkeypatch):
    shapes = ((2, 9, 24), (6, 24), (40, 6), (40,), (5, 40), (16, 5), (16,))
    args, found = [torch.randn(*shape, requires_grad=True) for shape in shapes], []
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("VITLR_BACKEND", backend)
        y = lowrank_mlp.lowrank_mlp(*args, None, "gelu")
        found.append(torch.autograd.grad(y.square().sum(), args))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_residual_layer_through_the_op(forced):
    x, B, A, bias = torch.randn(9, 70), torch.randn(4, 70), torch.randn(30, 4), torch.randn(30)
    R, scale = torch.randint(-127, 128, (30, 70), dtype=torch.int8), torch.rand(30, 3) / 100
    args = (x, B, A, R, scale, bias, "int8", 32)
    exact = lowrank_residual_linear.reference(*(a.double() if a is not R else a for a in args[:6]), *args[6:])
    assert_close_to(
        lowrank_residual_linear.lowrank_residual_linear(*args), lowrank_residual_linear.reference(*args), exact
    )


def test_compiled_for_any_number_of_rows(forced):
    layer = LowRankLinear(24, 40, 6).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (2, 5, 197):
            x = torch.randn(rows, 24)
            assert torch.equal(compiled(x), layer(x))


def test_several_threads_at_once(forced):
    """Blocks belong to a thread, packed weights to nobody: packed by many at once, they are the same."""
    layers = [LowRankLinear(64, 96, 16).requires_grad_(False) for _ in range(4)]
    inputs = [torch.randn(150, 64) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda i: layers[i % 4](inputs[i]), range(16)))
    for i, y in enumerate(outputs):
        assert torch.equal(y, layers[i % 4](inputs[i]))


class Features(Dataset):
    def __init__(self) -> None:
        self.layer = LowRankLinear(64, 96, 16).requires_grad_(False)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.layer(torch.full((300, 64), float(index)))


def test_workers_of_a_loader_run_it(forced):
    data = Features()
    here = [data[i] for i in range(4)]  # a parallel region before the fork
    there = list(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@fast
def test_modules_that_are_not_plain_are_called():
    layer = LowRankLinear(768, 768, 256).requires_grad_(False)
    seen = []
    layer.up.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(512, 768))
    assert seen and isinstance(layer.up, nn.Linear)


def test_unaligned_views(forced):
    def unaligned(*shape):
        size = torch.Size(shape).numel()
        return torch.randn(size + 1)[1:].view(shape)

    args = [unaligned(*shape) for shape in ((33, 50), (7, 50), (39, 7), (39,), (33, 39))]
    aligned = [arg.clone() for arg in args]
    assert torch.equal(lowrank_linear(*args, "gelu"), lowrank_linear(*aligned, "gelu"))
