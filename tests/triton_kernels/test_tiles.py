"""What choices of tiles have in common: dtypes, exactness, ranks as powers of two, tiles that shrink until they fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from vitlr.triton_kernels.targets import INTERPRETER, TARGETS, Unsupported
from vitlr.triton_kernels.tiles import check_dtype, check_sizes, fitting, precision, smaller, two_powers

SM_90 = TARGETS["sm_90"]


@dataclass(frozen=True)
class Config:
    BM: int = 128
    num_stages: int = 3


def test_ranks_are_sums_of_two_powers_of_two():
    for r in range(1, 257):
        R1, R2 = two_powers(r)
        held = R1 + R2
        assert r <= held <= max(16, 1 << (r - 1).bit_length()) and R2 < R1
        assert all(R in (16, 32, 64, 128, 256) for R in (R1, R2) if R)
    assert [two_powers(r) for r in (6, 24, 48, 80, 128, 144, 176, 192, 208)] == [
        (16, 0), (32, 0), (32, 16), (64, 16), (128, 0), (128, 16), (128, 64), (128, 64), (256, 0)
    ]  # fmt: skip


def test_what_is_not_taken_is_named():
    with pytest.raises(Unsupported, match=r"X is torch\.float64, taken are fp32, fp16, bf16"):
        check_dtype(torch.float64, SM_90, "X")
    with pytest.raises(Unsupported, match=r"x is torch\.bfloat16, .* wrong in Triton's interpreter"):
        check_dtype(torch.bfloat16, INTERPRETER)
    with pytest.raises(Unsupported, match="K=8, r=0, taken are sizes of at least 1"):
        check_sizes(K=8, r=0)
    check_dtype(torch.bfloat16, SM_90)
    check_sizes(K=8, r=1)


def test_exact_products_unless_torch_may_round_to_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="ieee"))
    assert precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision(torch.float32) == "tf32" and precision(torch.float16) == "ieee"


def test_tiles_shrink_step_by_step_until_they_fit():
    steps = (("num_stages", 2), ("BM", 128), ("BM", 64))
    assert list(smaller(Config(), steps)) == [Config(), Config(128, 2), Config(64, 2)]
    small = replace(SM_90, shared_memory=200)
    assert fitting(Config(), steps, lambda config: config.BM * config.num_stages, small) == Config(64, 2)
    with pytest.raises(Unsupported, match="fit the 100 bytes of shared memory of sm_90, the smallest take 128"):
        fitting(Config(), steps, lambda c: c.BM * c.num_stages, replace(SM_90, shared_memory=100))
