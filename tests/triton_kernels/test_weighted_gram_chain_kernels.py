"""The `W C Wᵀ` kernel: values in both precisions, symmetry, ragged and strided operands, refusals, tiles."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.weighted_gram_chain import Key, reference
from vitlr.ops.linalg.weighted_gram_chain import weighted_gram_chain as chain
from vitlr.triton_kernels import tables, weighted_gram_chain
from vitlr.triton_kernels.targets import INTERPRETER, TARGETS, Unsupported

DTYPES = [torch.float32, torch.float64]


def problem(b: int, m: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    C = torch.randn(b, k, k, dtype=dtype)
    return torch.randn(b, m, k, dtype=dtype).to(device), (C + C.mT).to(device)


def check(Y: Tensor, W: Tensor, C: Tensor) -> None:
    assert torch.equal(Y, Y.mT) and Y.is_contiguous()
    assert_close_to(Y, reference(W, C), W.double() @ C.double() @ W.double().mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 17), (1, 65, 70), (3, 30, 130)], ids=str)
def test_values(shape, dtype, device, poison, triton_backend):
    poison(weighted_gram_chain)
    W, C = problem(*shape, dtype, device)
    check(chain(W, C), W, C)


@pytest.mark.parametrize("layout", ["transposed", "batch inside", "one for all", "every second"])
def test_strides(layout, device, poison, triton_backend):
    poison(weighted_gram_chain)
    W, C = problem(3, 40, 40, torch.float64, device)
    if layout == "transposed":
        W = W.mT
    elif layout == "batch inside":
        W, C = W.permute(1, 2, 0).contiguous().permute(2, 0, 1), C.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    elif layout == "one for all":
        C = C[:1].expand(3, 40, 40)
    else:
        W = W.repeat_interleave(2, 2)[:, :, ::2]
    check(chain(W, C), W, C)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty(shape, device, triton_backend, monkeypatch):
    monkeypatch.setattr(weighted_gram_chain, "_launch", None)
    W, C = problem(*shape, torch.float64, device)
    assert torch.equal(chain(W, C), torch.zeros(shape[0], shape[1], shape[1], dtype=torch.float64, device=device))


@pytest.mark.parametrize("poison_value", [float("nan"), float("inf")])
def test_nan_and_inf_pass_through(poison_value, device, triton_backend):
    W, C = problem(2, 6, 5, torch.float64, device)
    C[1, 2, 2] = poison_value
    torch.testing.assert_close(chain(W, C), reference(W, C), equal_nan=True)


def test_opcheck(device, triton_backend):
    torch.library.opcheck(torch.ops.vitlr.weighted_gram_chain.default, problem(2, 5, 7, torch.float64, device))


def test_what_it_refuses(triton_backend):
    for name in ("sm_86", "sm_89", "sm_120"):
        with pytest.raises(Unsupported, match=f"float64 on {name}, taken are sm_80"):
            weighted_gram_chain.config(1, 8, 8, torch.float64, TARGETS[name])
    with pytest.raises(Unsupported, match=r"W is torch\.float16, taken are"):
        weighted_gram_chain.config(1, 8, 8, torch.float16, INTERPRETER)


def test_it_never_ran_and_is_not_the_default(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    assert registry.select("weighted_gram_chain", Key(2, 8, 8)).name == "torch"
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    with pytest.raises(InputError, match="no such candidate"):
        registry.select("weighted_gram_chain", Key(2, 8, 8))


def test_tiles_fit_every_card_and_come_from_the_table(monkeypatch):
    for target in TARGETS.values():
        assert weighted_gram_chain.config(1, 768, 768, torch.float32, target).shared(4) <= target.shared_memory
    config = {"BM": 32, "BK": 16, "num_warps": 2, "num_stages": 2}
    row = {"target": "sm_90", "bits": 64, "m": 96, "k": 96, "config": config}
    monkeypatch.setattr(tables, "measured", lambda kernel: (row,))
    chosen = weighted_gram_chain.config(1, 96, 96, torch.float64, TARGETS["sm_90"])
    assert chosen == weighted_gram_chain.Config(**config)
    assert weighted_gram_chain.tiles(2, 96, 96, chosen) == 2 * (9 + 6)


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
    for dtype in (torch.float32, torch.float64, torch.float64):
        W, C = problem(1, 9, 8, dtype, device)
        check(weighted_gram_chain.run(W, C), W, C)
    assert tuned == [{"m": 9, "k": 8}] * 2, "once for each width"
    tables.measured.cache_clear()
