"""What the two Triton variants of the low-rank linear take, with which tiles, and which of them dispatch prefers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from vitlr.ops import explain
from vitlr.ops.backends.triton.lowrank_linear import row_block_floor, split_floor
from vitlr.ops.dispatch.ceilings import H200, Ceilings
from vitlr.ops.layers.lowrank_linear import Key
from vitlr.triton_kernels.activations import INSTRUCTIONS
from vitlr.triton_kernels.lowrank_linear import row_block, shared_memory, tiles
from vitlr.triton_kernels.lowrank_linear_split import configs, split
from vitlr.triton_kernels.lowrank_linear_split import shared_memory as split_memory
from vitlr.triton_kernels.lowrank_linear_split import tiles as split_tiles
from vitlr.triton_kernels.tables import shipped
from vitlr.triton_kernels.targets import INTERPRETER, TARGETS, Unsupported

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SM_90 = TARGETS["sm_90"]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_every_rank_fits_every_architecture(monkeypatch, target, dtype, precision):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
    for r in (1, 64, 128, 192, 256):
        for residual in (False, True):
            config = row_block(None, 768, 3072, r, residual, dtype, target)
            assert shared_memory(config, r, residual, dtype) <= target.shared_memory
        for M in (None, 1, 197, 1576, 12608):
            assert split_memory(split(M, 768, 3072, r, dtype, target), dtype) <= target.shared_memory


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_block(9, 768, 768, 257, False, torch.float16, SM_90), "rank 257, .* takes up to 256"),
        (lambda: row_block(9, 768, 768, 64, False, torch.float64, SM_90), "x is torch.float64, taken are fp32"),
        (lambda: split(9, 768, 768, 64, torch.float64, SM_90), "x is torch.float64, taken are fp32"),
        (lambda: split(9, 768, 768, 64, torch.bfloat16, INTERPRETER), "bfloat16, .* interpreter"),
        (lambda: row_block(9, 0, 768, 64, False, torch.float16, SM_90), "K=0, N=768, r=64"),
        (lambda: split(9, 768, 768, 0, torch.float16, SM_90), "r=0"),
    ],
)
def test_what_is_not_taken_is_named(call, message):
    with pytest.raises(Unsupported, match=message):
        call()


def test_the_table_is_looked_up_and_complete():
    rows = shipped("lowrank_linear")
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["from"] == "compiled, not run"
        config = row_block(12608, 768, 3072, row["r"], False, torch.bfloat16, TARGETS[row["target"]])
        assert vars(config) == row["config"]  # and so it fits


def test_shares_of_k_fill_the_processors_and_none_is_empty():
    for M, K, N, r in ((1, 768, 768, 64), (197, 768, 3072, 128), (197, 3072, 768, 128), (1576, 768, 3072, 256)):
        config = split(M, K, N, r, torch.bfloat16, SM_90)
        shrinking, _ = split_tiles(M, N, r, config)
        assert shrinking <= SM_90.sms
        steps = math.ceil(K / config.BK)
        assert config.splits == 8 or shrinking * 2 > SM_90.sms or steps // 2 < config.splits * 2
        for option in [config, *configs(M, K, N, r, torch.bfloat16, SM_90)]:
            span = math.ceil(math.ceil(K / option.BK) / option.splits) * option.BK
            assert span * (option.splits - 1) < K <= span * option.splits


def test_floors_count_whole_waves():
    # 99 programs on 132 processors: compute takes as long as 132 would.
    key = Key(12608, 768, 3072, 256, True, "none", False, torch.float16)
    config = row_block(12608, 768, 3072, 256, False, torch.float16, INTERPRETER)
    assert tiles(12608, config) == 99
    assert row_block_floor(key, H200) == pytest.approx(1e6 * 132 * 2 * 128 * 256 * 3840 / 790e12)
    # Memory-bound: the bytes of one pass; with two launches T [M, r] is written and read once more.
    thin = key._replace(r=64)
    assert row_block_floor(thin, H200) == pytest.approx(1e6 * 2 * (12608 + 64) * 3840 / 4.3e12)
    assert split_floor(thin, H200) == pytest.approx(row_block_floor(thin, H200) + 1e6 * 4 * 12608 * 64 / 4.3e12)
    # A residual is read, too; a dtype whose peak nobody measured has no floor.
    more = row_block_floor(thin._replace(residual=True), H200) - row_block_floor(thin, H200)
    assert more == pytest.approx(1e6 * 2 * 12608 * 3072 / 4.3e12)
    assert row_block_floor(key, Ceilings("unknown", 1e12, {})) is None
    assert split_floor(key._replace(dtype=torch.float32), H200) is None


def test_floors_count_what_activations_issue():
    key = Key(12608, 768, 3072, 128, True, "gelu", False, torch.float16)
    cycles = (INSTRUCTIONS["gelu"] + 1.5) * 128 * 3072 / 128  # one program: 128 lanes issue in a cycle; bias, rounding
    assert row_block_floor(key, H200) == pytest.approx(1e6 * cycles * 132 * 4096 / 790e12)
    # 99 programs leave processors idle; many small ones share the work better, until there are rows for all.
    assert split_floor(key, H200) < row_block_floor(key, H200)
    assert row_block_floor(key._replace(M=50432), H200) < split_floor(key._replace(M=50432), H200)


@pytest.mark.parametrize(
    ("M", "r", "act", "chosen"),
    [
        (1, 64, "none", "triton.split"),
        (197, 128, "none", "triton.split"),
        (1576, 128, "none", "triton.split"),
        (12608, 64, "none", "triton.row_block"),
        (12608, 128, "none", "triton.row_block"),
        (50432, 128, "none", "triton.row_block"),
        (12608, 256, "none", "triton.split"),  # 99 programs leave a quarter of the processors idle
        (12608, 128, "gelu", "triton.split"),
        (50432, 128, "gelu", "triton.row_block"),
        (50432, 300, "none", "triton.split"),
    ],
)
def test_the_better_floor_is_taken(triton_backend, M, r, act, chosen):
    told = explain("lowrank_linear", M=M, K=768, N=3072, r=r, act=act, dtype=torch.float16, ceilings=H200)
    assert told.chosen == chosen, str(told)


def test_without_an_override_nothing_untried_runs(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    told = explain("lowrank_linear", M=12608, K=768, N=3072, r=64, dtype=torch.float16, ceilings=H200)
    assert told.chosen == "torch"
    assert {row.why for row in told.rows if "triton" in row.candidate} == {
        "compiled, not run: it never ran on real hardware"
    }


def test_rows_that_are_not_known_yet_are_no_objection(triton_backend):
    assert explain("lowrank_linear", M=None, K=768, N=3072, r=64, dtype=torch.float16).chosen.startswith("triton.")
