"""The Gram kernel: values, symmetry, ragged and strided rows, several layers at once, refusals, tiles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_close_to
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.gram import Key, gram_update_, reference
from vitlr.triton_kernels import gram, tables
from vitlr.triton_kernels.symmetric import triangle
from vitlr.triton_kernels.targets import INTERPRETER, TARGETS, Unsupported


def problem(T: int, n: int, dtype: torch.dtype, device: torch.device, weighted: bool = False) -> tuple:
    """C with something in it already, X and weights."""
    C = torch.randn(n, n, dtype=torch.float64)
    weight = torch.rand(T).to(device) if weighted else None
    return (C + C.mT).to(device), torch.randn(T, n).to(device, dtype), weight


def check(C: Tensor, before: Tensor, X: Tensor, weight: Tensor | None) -> None:
    """C is what was there plus the Gram matrix, exactly symmetric."""
    x = X.double()
    exact = before + (x if weight is None else x * weight.double()[:, None]).mT @ x
    assert torch.equal(C, C.mT)
    assert_close_to(C, reference(before.clone(), X, weight), exact)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("T", "n"), [(1, 7), (63, 64), (197, 70), (40, 130)])
def test_values(T, n, weighted, dtype, device, poison, triton_backend):
    poison(gram)
    C, X, weight = problem(T, n, dtype, device, weighted)
    before = C.clone()
    gram_update_(C, X, weight)
    check(C, before, X, weight)


@pytest.mark.parametrize("layout", ["columns", "every second", "expanded", "offset"])
def test_strided_rows(layout, device, poison, triton_backend):
    poison(gram)
    C, X, _ = problem(50, 20, torch.float32, device)
    X = {
        "columns": X.mT.contiguous().mT,
        "every second": X.repeat_interleave(2, 1)[:, ::2],
        "expanded": X[:1].expand(50, 20),
        "offset": torch.cat([X, X])[7:57],
    }[layout]
    before = C.clone()
    gram_update_(C, X)
    check(C, before, X, None)


@pytest.mark.parametrize(("rows", "scratch"), [(64, 2**24), (64, 1)])
def test_long_sums_are_split(rows, scratch, device, poison, monkeypatch):
    """Over stretches of one launch, and over several launches where the scratch memory is short."""
    poison(gram)
    monkeypatch.setattr(gram, "ROWS", rows)
    monkeypatch.setattr(gram, "SCRATCH", scratch)
    C, X, weight = problem(300, 33, torch.float32, device, True)
    before = C.clone()
    gram.run(C, X, weight)
    check(C, before, X, weight)


def test_the_same_every_time(device):
    C, X, _ = problem(400, 40, torch.float32, device)
    D = C.clone()
    gram.run(C, X)
    gram.run(D, X)
    assert torch.equal(C, D)


def test_several_layers_at_once(device, poison, monkeypatch):
    poison(gram)
    launches = []
    pair = gram._pair
    monkeypatch.setattr(gram, "_pair", lambda members, *rest: (launches.append(len(members)), pair(members, *rest)))
    sizes = [(5, 7), (100, 70), (0, 9), (33, 64), (1, 1)]
    updates = [problem(T, n, torch.float32, device) for T, n in sizes]
    updates += [problem(20, 12, torch.float32, device, True), problem(9, 10, torch.float16, device)]
    before = [C.clone() for C, _, _ in updates]
    gram.gram_update_many(updates)
    for (C, X, weight), old in zip(updates, before, strict=True):
        check(C, old, X, weight)
    assert sorted(launches) == [1, 1, 4]  # weighted, half, and all others together
    with pytest.raises(ValueError, match="same C"):
        gram.gram_update_many([updates[0], updates[0]])


def test_more_layers_than_one_launch_takes(device):
    updates = [problem(3, 4, torch.float32, device) for _ in range(gram.MEMBERS + 1)]
    before = [C.clone() for C, _, _ in updates]
    gram.gram_update_many(updates)
    for (C, X, weight), old in zip(updates, before, strict=True):
        check(C, old, X, weight)


def test_no_rows_launch_nothing(device, triton_backend, monkeypatch):
    monkeypatch.setattr(gram, "_pair", None)
    C = torch.eye(5, dtype=torch.float64, device=device)
    gram_update_(C, torch.zeros(0, 5, device=device))
    assert torch.equal(C, torch.eye(5, dtype=torch.float64, device=device))


@pytest.mark.parametrize("poison_value", [float("nan"), float("inf")])
def test_nan_and_inf_pass_through(poison_value, device, triton_backend):
    X = torch.randn(10, 6, device=device)
    X[3, 2] = poison_value
    C, D = (torch.zeros(6, 6, dtype=torch.float64, device=device) for _ in range(2))
    gram_update_(C, X)
    reference(D, X)
    torch.testing.assert_close(C, D, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_opcheck(device, triton_backend):
    C, X, weight = problem(9, 5, torch.float32, device, True)
    torch.library.opcheck(torch.ops.vitlr.gram_update_.default, (C, X, weight))


def test_what_it_refuses(triton_backend):
    with pytest.raises(Unsupported, match=r"X is torch\.float64, taken are"):
        gram.config(10, 5, False, torch.float64, TARGETS["sm_90"])
    with pytest.raises(Unsupported, match="wrong in Triton's interpreter"):
        gram.config(10, 5, False, torch.bfloat16, INTERPRETER)
    with pytest.raises(InputError, match="float64"):
        registry.select("gram_update_", Key(10, 5, dtype=torch.float64))


def test_it_never_ran_and_is_not_the_default(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    assert registry.select("gram_update_", Key(100, 8)).backend != "triton"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiles_fit_every_card(name, dtype):
    for n in (1, 192, 768, 4096):
        for weighted in (False, True):
            chosen = gram.config(None, n, weighted, dtype, TARGETS[name])
            assert chosen.shared(4 if weighted else dtype.itemsize) <= TARGETS[name].shared_memory
            assert gram.ROWS % chosen.BT == 0


def test_tiles_come_from_the_table(monkeypatch):
    row = {"target": "sm_90", "bits": 16, "n": 96, "config": {"BM": 32, "BT": 16, "num_warps": 2, "num_stages": 2}}
    monkeypatch.setattr(tables, "measured", lambda kernel: (row,))
    assert gram.config(10, 96, False, torch.bfloat16, TARGETS["sm_90"]) == gram.Config(32, 16, 2, 2)
    assert gram.config(10, 97, False, torch.bfloat16, TARGETS["sm_90"]) != gram.Config(32, 16, 2, 2)


def test_tuning_measures_once_and_leaves_the_result_alone(device, monkeypatch, tmp_path):
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.measured.cache_clear()
    tune, tuned = tables.tune, []

    def first_two(kernel, target, dtype, sizes, configs, run, card):
        tuned.append(dict(sizes))
        clock = iter([2.0, 1.0])
        return tune(kernel, target, dtype, sizes, configs[:2], run, card, lambda function: (function(), next(clock))[1])

    monkeypatch.setattr(tables, "tune", first_two)
    for dtype in (torch.float32, torch.float32, torch.float16):
        C, X, _ = problem(20, 9, dtype, device)
        before = C.clone()
        gram.run(C, X)
        check(C, before, X, None)
    assert tuned == [{"n": 9}, {"n": 9}], "once for each width"
    tables.measured.cache_clear()


@pytest.mark.parametrize("T", [1, 197, 4096, 4097, 12608, 50432])
@pytest.mark.parametrize("count", [1, 21, 300])
def test_stretches_cover_all_rows_and_none_is_too_long(T, count):
    for BT in (16, 64):
        stretches, steps = gram.split(T, count, BT, 132)
        assert stretches * steps * BT >= T > (stretches - 1) * steps * BT
        assert steps * BT <= gram.ROWS


@triton.jit
def tile_indices(p_out, first, N: tl.constexpr):
    """Rows and columns of N tiles from `first` on, [N, 2]."""
    k = tl.arange(0, N)
    i, j = triangle(first + k)
    tl.store(p_out + 2 * k, i)
    tl.store(p_out + 2 * k + 1, j)


@pytest.mark.parametrize("first", [0, 2_000_000])
def test_every_tile_of_a_triangle_is_found_once(first, device):
    """Row by row, as far as a rounded square root could go wrong."""
    out = torch.empty(4096, 2, dtype=torch.int32, device=device)
    tile_indices[(1,)](out, first, N=4096)
    i, j = out.long().unbind(1)
    assert torch.equal(i * (i + 1) // 2 + j, first + torch.arange(4096, device=device))
    assert ((j >= 0) & (j <= i)).all()
