"""`C += Xᵀ diag(w) X` as an op: values, dtypes, dispatch, schema, errors."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.ops.backends import native
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.gram import ROWS, Key, gram_update_, products, reference, roofline

OVERLOAD = torch.ops.vitlr.gram_update_.default
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def zeros(n, device="cpu"):
    return torch.zeros(n, n, dtype=torch.float64, device=device)


def exact(X, weight=None):
    x = X.double()
    return (x if weight is None else x * weight.double()[:, None]).mT @ x


@DEVICES
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "n"), [(1, 7), (63, 33), (ROWS + 5, 24)])
def test_values(T, n, dtype, weighted, device):
    X = torch.randn(T, n).to(dtype).to(device)
    weight = torch.rand(T).to(device) if weighted else None
    C, plain = zeros(n, device), zeros(n, device)
    gram_update_(C, X, weight)
    # Half precision is multiplied in fp32, so it is held to what fp32 reaches on the same rows.
    reference(plain, X, weight)
    truth = exact(X, weight)
    assert_close_to(C, plain, truth)
    assert torch.equal(C, C.mT)
    eps = 1e-12 if dtype == torch.float64 else 2e-6
    assert (C - truth).abs().max() <= eps * T**0.5 * truth.diagonal().abs().max()


@DEVICES
def test_updates_add_up(device):
    X = torch.randn(50, 20, device=device)
    whole, parts = zeros(20, device), zeros(20, device)
    gram_update_(whole, X)
    for rows in X.split(7):
        gram_update_(parts, rows)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_no_rows_change_nothing():
    C = torch.eye(5, dtype=torch.float64)
    gram_update_(C, torch.zeros(0, 5))
    gram_update_(C, torch.zeros(0, 5), torch.zeros(0))
    assert torch.equal(C, torch.eye(5, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 600),
    n=st.integers(1, 120),
    weighted=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "strided"]),
    seed=st.integers(0, 2**31),
)
def test_native_and_reference_agree(T, n, weighted, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(T, n, generator=generator)
    X = {"rows": X, "columns": X.mT.contiguous().mT, "strided": X.repeat_interleave(2, 1)[:, ::2]}[layout]
    weight = torch.rand(T, generator=generator) if weighted else None
    C, plain = zeros(n), zeros(n)
    gram_update_(C, X, weight)
    reference(plain, X, weight)
    # The bound of sums of `depth` fp32 products, entry by entry: no draw can break it by bad luck.
    allowed = 2.0**-24 * (min(T, ROWS) + 4) * exact(X.abs(), weight)
    assert ((C - exact(X, weight)).abs() <= allowed).all()
    assert ((plain - exact(X, weight)).abs() <= allowed).all()
    assert torch.equal(C, C.mT) and torch.equal(plain, plain.mT)


def test_weights_of_zero_and_of_any_scale():
    X = torch.randn(6, 9)
    weight = torch.tensor([0.0, 1e-20, 1.0, 1e20, 0.0, 2.0], dtype=torch.float64)
    C = zeros(9)
    gram_update_(C, X, weight)
    torch.testing.assert_close(C, exact(X, weight), rtol=1e-5, atol=1e14)


@DEVICES
@pytest.mark.parametrize("backend", ["torch", None])
def test_autocast_and_fast_math_do_not_reach_it(monkeypatch, backend, device):
    """A second moment in TF32 or bf16 products would spoil every rank that comes from it."""
    if backend:
        monkeypatch.setenv("VITLR_BACKEND", backend)
    X, C = torch.randn(512, 96, device=device), zeros(96, device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        settings_before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        with torch.autocast(device, dtype=torch.bfloat16):
            gram_update_(C, X)
        settings_after = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    finally:
        torch.set_float32_matmul_precision(before)
    truth = exact(X)
    assert (C - truth).abs().max() <= 2e-6 * truth.abs().max()
    assert settings_after == settings_before


def test_leaves_autograd_alone():
    X = torch.randn(8, 4, requires_grad=True)
    C = zeros(4)
    gram_update_(C, X * 2, X[:, 0].abs())
    assert not C.requires_grad and X.grad is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, weighted):
    torch.library.opcheck(OVERLOAD, (zeros(5), torch.randn(9, 5).to(dtype), torch.rand(9) if weighted else None))


def test_compiles_without_a_break():
    @torch.compile(fullgraph=True, backend="eager")
    def update(C, X):
        gram_update_(C, X)
        return C.diagonal().sum()

    C, X = zeros(6), torch.randn(20, 6)
    total = update(C, X)
    torch.testing.assert_close(C, exact(X), rtol=1e-5, atol=1e-5)
    assert total == C.diagonal().sum()


def test_flops_are_those_of_one_triangle():
    with FlopCounterMode(display=False) as counter:
        gram_update_(zeros(6), torch.randn(20, 6))
    assert counter.get_total_flops() == 20 * 6 * 7 == roofline(Key(20, 6)).flops


def test_dispatch(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    there = native.available() and native.best_isa() != "portable"
    for dtype in (torch.float32, torch.bfloat16):
        assert registry.select("gram_update_", Key(100, 8, dtype=dtype)).name == ("cpu" if there else "torch")
    assert registry.select("gram_update_", Key(100, 8, dtype=torch.float64)).name == "torch"
    assert registry.select("gram_update_", Key(100, 8, device=torch.device("cuda"))).name == "torch"
    assert "fp64" in str(registry.explain("gram_update_", T=100, n=8, dtype=torch.float64))


def test_without_the_extension_torch_runs(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", ModuleNotFoundError("No module named 'vitlr._C'"))
    monkeypatch.setattr(registry, "_chosen", {})
    assert not native.available() and "not built" in native.why_not()
    assert native.build_info()["isa_used"] is None and native.best_isa() is None
    assert registry.select("gram_update_", Key(100, 8)).name == "torch"
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    with pytest.raises(InputError, match="not built"):
        gram_update_(zeros(4), torch.randn(10, 4))


def test_an_extension_older_than_its_sources_is_told_with_the_command(tmp_path, monkeypatch):
    class Built:
        def __init__(self, **info):
            self.build_info = lambda: info

    sources = tmp_path / "bindings.cpp"
    monkeypatch.setattr(native, "_BINDINGS", sources)
    assert native._outdated(Built()) is None  # an installed wheel: there are no sources
    sources.write_bytes(b"int main() {}")
    assert native._outdated(Built(bindings=zlib.crc32(b"int main() {}"))) is None
    for other in (Built(), Built(bindings=1)):
        why = native._outdated(other)
        assert "older than its sources" in why and "pip install -e ." in why
        monkeypatch.setattr(native, "_C", None)
        monkeypatch.setattr(native, "_old", why)
        assert native.why_not() == why


@pytest.mark.skipif(not native.available(), reason="no native extension")
def test_the_extension_that_is_loaded_is_of_these_sources():
    assert native._outdated(native._C) is None


def test_a_failed_build_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_FAILURE", tmp_path / "why.txt")
    (tmp_path / "why.txt").write_text("CompileError: command 'c++' failed\n")
    assert native.why_not() == "vitlr._C was not built: CompileError: command 'c++' failed"


@pytest.mark.parametrize(
    ("C", "X", "weight", "message"),
    [
        (zeros(4), torch.randn(3, 5), None, r"C is \[4, 4\].*expected \[5, 5\]"),
        (torch.zeros(5, 5), torch.randn(3, 5), None, "C is .*float32.*expected .*float64"),
        (zeros(10)[::2, ::2], torch.randn(3, 5), None, "not contiguous"),
        (zeros(5), torch.randn(2, 3, 5), None, r"X is \[2, 3, 5\]"),
        (zeros(5), torch.ones(3, 5, dtype=torch.int64), None, "int64"),
        (zeros(5), torch.randn(3, 5), torch.ones(4), r"weight is \[4\].*expected \[3\]"),
        (zeros(5), torch.randn(3, 5), torch.ones(3, dtype=torch.int64), "floating"),
        (zeros(5), torch.randn(3, 5), torch.tensor([1.0, -2.0, 0.0]), r"negative entry \(-2\)"),
        (zeros(5), torch.randn(3, 5, device="meta"), None, "C is on cpu, X on meta"),
    ],
)
def test_bad_input(C, X, weight, message):
    with pytest.raises(InputError, match=message):
        gram_update_(C, X, weight)
    assert not C.any()


def test_halves_on_a_gpu_are_multiplied_by_the_library_and_summed_in_fp32(monkeypatch):
    X, asked = torch.randn(ROWS + 10, 5).bfloat16(), []

    def mm(a, b, *, out_dtype):  # what torch has for CUDA alone
        asked.append((a.shape, out_dtype))
        return a.to(out_dtype) @ b.to(out_dtype)

    class OnCuda:
        device, dtype = torch.device("cuda"), torch.bfloat16
        split = staticmethod(X.split)

    monkeypatch.setattr(torch, "mm", mm)
    found = sum(P.double() for P in products(OnCuda(), None))
    assert asked == [((5, ROWS), torch.float32), ((5, 10), torch.float32)]
    torch.testing.assert_close(found, X.double().mT @ X.double(), rtol=1e-5, atol=1e-3)
