"""With which tiles an MLP of low-rank linears runs: what the kernel of lowrank_mlp takes, and what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from . import lowrank_linear_split, tables
from .targets import Target, Unsupported
from .tiles import check_dtype, check_sizes, fitting, precision, two_powers

KERNEL = "lowrank_mlp"
LARGEST_RANK = 256
MOST_SPLITS = 16  # the second launch reads all partial sums for every tile of y; with 32 its registers spill
CLASSES = (64, 128, 192, 256)
"""Ranks for which tiles are compiled and kept in the table; others take those of the next one."""
SMALLER = (("num_stages", 2), ("BN", 32), ("BK", 32), ("BD", 32), ("BM", 64), ("BK", 16), ("BM", 32))
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Rows, hidden columns, depth of K and output columns of the tiles; warps; stages; shares of D.

    `staged`: T goes through memory, so that the tensor cores read it from shared memory and no registers hold it.
    """

    BM: int
    BD: int
    BK: int
    BN: int
    num_warps: int
    num_stages: int
    staged: int = 0
    splits: int = 1


def row_block(
    M: int | None, K: int, D: int, N: int, r1: int | None, r2: int | None, dtype: torch.dtype, target: Target
) -> Config:
    """The tiles of a shape; M is None where rows are not known, r1 where fc1 is dense.

    Raises Unsupported for a dtype, rank or size that is not taken and where no tiles fit the shared memory.
    """
    if r2 is None:
        raise Unsupported(f"fc2 is dense: its sums would be {N} wide and are kept in registers, up to {LARGEST_RANK}")
    check_dtype(dtype, target)
    check_sizes(K=K, D=D, N=N, r1=K if r1 is None else r1, r2=r2)
    for name, r in (("r1", r1), ("r2", r2)):
        if r is not None and r > LARGEST_RANK:
            raise Unsupported(f"{name}={r}, ranks are held in registers and taken up to {LARGEST_RANK}")
    BM = block_rows(M, target.sms)
    wanted = _tiles(BM, r1, r2, dtype, target)
    row = tables.nearest(KERNEL, target, dtype, M=M, K=K, D=D, N=N, **class_of(BM, r1, r2))
    if row is not None:
        wanted = Config(**row)
    if ragged(wanted, K, D, N, r1, r2):  # masks take registers
        if wanted.BM == 64 and max(r1 or 0, r2) > 128:
            wanted = replace(wanted, BD=32, num_warps=8)
        elif wanted.BD > 64:
            wanted = replace(wanted, BD=64)
    return fitting(wanted, SMALLER, lambda config: shared_memory(config, r1, r2, dtype), target)


def split(
    M: int | None, K: int, D: int, N: int, r1: int | None, r2: int | None, dtype: torch.dtype, target: Target
) -> Config:
    """The tiles of a shape whose hidden width is shared by several programs.

    Raises Unsupported as `row_block` does, and where there is nothing to share.
    """
    config = row_block(M, K, D, N, r1, r2, dtype, target)
    assert r2 is not None
    lowrank_linear_split.split(M, r2, N, r2, dtype, target)
    steps = triton.cdiv(D, config.BD)
    shares = min(MOST_SPLITS, steps, target.sms // tiles(M or 1, config))
    if shares < 2:
        raise Unsupported(f"M={M}, D={D}: the row blocks fill the processors or D is one tile, nothing to share")
    return replace(config, splits=1 << (shares.bit_length() - 1))  # few values: each is compiled on its own


def block_rows(M: int | None, sms: int) -> int:
    """128 or 64 rows a program: what takes the fewest rows of time in whole waves, the larger where they are equal."""
    return 128 if M is None else min((128, 64), key=lambda BM: BM * triton.cdiv(triton.cdiv(M, BM), sms))


def tiles(M: int, config: Any) -> int:
    """Programs launched, those of one share of D."""
    return triton.cdiv(M, config.BM)


def shared_memory(config: Config, r1: int | None, r2: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory, at least what the compilers take: the largest of the three loops, which share it."""
    c, size = config, dtype.itemsize
    R1, R2 = 0 if r1 is None else sum(two_powers(r1)), sum(two_powers(r2))
    if r1 is None:
        first, hidden = c.num_stages * c.BK * (c.BM + c.BD), c.BD * (R2 + c.BM)
    else:
        first, hidden = c.num_stages * c.BK * (c.BM + R1), c.num_stages * c.BD * (R1 + R2)
        hidden += c.BM * (R1 if c.staged or size == 4 else 0)
    last = c.num_stages * c.BN * (R2 + c.BM)
    return max(first + (hidden if r1 is None else 0), hidden, last) * size + 16 * 1024


def class_of(BM: int, r1: int | None, r2: int) -> dict[str, int]:
    """What the table's rows are keyed by: rows of the block, the class of the larger rank, 0 for a dense fc1."""
    r = next(size for size in CLASSES if max(r1 or 0, r2) <= size)
    return {"BM": BM, "r": r, "r1": r1 or 0, "r2": r2}


def _tiles(BM: int, r1: int | None, r2: int, dtype: torch.dtype, target: Target) -> Config:
    """What is tried first where no table names the target, and in fp32."""
    r = max(r1 or 0, r2)
    if dtype is torch.float32:
        return Config(32, 32, 32 if r <= 128 else 16, 32, 8, 2)
    if r <= 128:
        return Config(BM, 64, 64, 32, BM // 16, 3)
    return Config(BM, 32, 32, 32, BM // 16, 3, staged=1)


def configs(r1: int | None, r2: int, dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit, smaller ones where registers are short; in fp32 nothing."""
    if dtype is torch.float32:
        return []
    staged = int(max(r1 or 0, r2) > 128)
    options = [
        Config(BM, BD, BK, BN, BM // 16, stages, staged)
        for BM in (128, 64)
        for BD, BK, BN in ((128, 64, 64), (64, 64, 64), (64, 64, 32), (32, 32, 32))
        for stages in (3, 2)
    ]
    return [option for option in options if shared_memory(option, r1, r2, dtype) <= target.shared_memory]


def ragged(config: Config, K: int, D: int, N: int, r1: int | None, r2: int) -> bool:
    """Whether something else than rows has to be masked."""
    ranks = all(r == sum(two_powers(r)) for r in (r1 or r2, r2))
    return not ranks or bool(K % config.BK or D % config.BD or N % config.BN)


def constants(
    config: Config, K: int, D: int, N: int, r1: int | None, r2: int, span: int, act: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The constants of the kernel; `span`: hidden columns of a program."""
    R1, R2 = (0, 0) if r1 is None else two_powers(r1), two_powers(r2)
    even = not ragged(config, K, D, N, r1, r2) and D % span == 0
    return {
        "K": K, "D": D, "N": N, "SPAN": span, "BM": config.BM, "BD": config.BD, "BK": config.BK, "BN": config.BN,
        "R1A": R1[0], "R1B": R1[1], "R2A": R2[0], "R2B": R2[1],
        "ACT": act, "EVEN": even, "PRECISION": precision(dtype),
    }  # fmt: skip
