"""`C += Xᵀ diag(w) X`, C symmetric in fp64: the second moments of calibration, for one layer or several in one launch.

Two launches. `partial`: one program forms one tile of the lower triangle over one stretch of rows (at most ROWS, so
that no fp32 sum is longer) in fp32 and writes it to scratch memory. `flush`: the partial tiles are added to C in fp64,
in the order of their rows, and stored twice, as they are and mirrored. The split over rows fills the GPU where the
triangle has few tiles (21 at n = 768 against 132 processors); an ordered sum instead of atomics keeps results the same
from run to run, and C exactly symmetric.

Rows in fp16 and bf16 go to the tensor cores, where their products are exact in fp32. Weighted rows `w x` have no exact
half-precision form, so they are multiplied in fp32 as fp32 rows are: IEEE, never TF32.

Several layers (`gram_update_many`): pointers, sizes and strides of up to MEMBERS updates are passed by value, as
tuples, and a program picks its own. Nothing is copied to the device for it, so a CUDA graph can capture it.
Floor: `T n (n + 1)` FLOPs; X once, C read and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .compilation import Case, where_taken
from .symmetric import triangle
from .targets import Target, target_of
from .tiles import DTYPES, check_dtype, fitting

KERNEL = "gram"
ROWS = 4096  # the longest sum in fp32
MEMBERS = 8  # updates in one launch
SCRATCH = 2**24  # entries of scratch memory, 64 MiB: longer X is taken in several launches
FLUSH = 32  # rows of a tile that one program of `flush` adds: in fp64 a whole tile does not fit in registers

SMALLER = (("num_stages", 3), ("num_stages", 2), ("num_stages", 1), ("BT", 32), ("BT", 16))
"""How tiles are cut down where shared memory is short."""

Update = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Config:
    """Tiles of BM x BM of C, BT rows of X at a time."""

    BM: int
    BT: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory: two operand tiles a stage of the pipeline, or what `flush` turns over in fp64."""
        return max(2 * self.BM * self.BT * self.num_stages * itemsize, 8 * self.BM * min(FLUSH, self.BM))


def config(T: int | None, n: int, weighted: bool, dtype: torch.dtype, target: Target) -> Config:
    """The tiles for X [T, n]. Raises Unsupported for a dtype, or bf16 in the interpreter."""
    check_dtype(dtype, target, "X")
    products = torch.float32 if weighted else dtype
    row = tables.nearest(KERNEL, target, products, n=n)
    half = products != torch.float32
    chosen = Config(**row) if row else Config(64, 32 if half else 16, 4, 2)
    return fitting(chosen, SMALLER, lambda option: option.shared(products.itemsize), target)


def configs(weighted: bool, dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit."""
    products = torch.float32 if weighted else dtype
    depths = (16, 32) if products == torch.float32 else (32, 64)
    every = [Config(BM, BT, w, s) for BM, w in ((64, 4), (128, 4), (128, 8)) for BT in depths for s in (2, 3, 4)]
    return [c for c in every if c.shared(products.itemsize) <= target.shared_memory]


def split(T: int, tiles: int, BT: int, sms: int) -> tuple[int, int]:
    """Stretches of rows and steps of BT rows in each: at most ROWS rows, in as few full waves of programs as it goes.

    Steps keep five significant bits: they are a constant of the kernel, and one is compiled for each.
    """
    least = triton.cdiv(T, ROWS)
    most = max(least, min(triton.cdiv(2 * sms, tiles), triton.cdiv(T, 4 * BT)))
    stretches = min(range(least, most + 1), key=lambda s: (triton.cdiv(tiles * s, sms) / s, s))
    steps = triton.cdiv(T, stretches * BT)
    unit = 1 << max(steps.bit_length() - 5, 0)
    steps = min(triton.cdiv(steps, unit) * unit, ROWS // BT)
    return triton.cdiv(T, steps * BT), steps


def tiles(n: int, chosen: Config) -> int:
    """Tiles of the triangle."""
    rows = triton.cdiv(n, chosen.BM)
    return rows * (rows + 1) // 2


@triton.jit
def pick(values, member):
    """The member's entry of a tuple of arguments."""
    chosen = values[0]
    for g in tl.static_range(1, len(values)):
        chosen = tl.where(member == g, values[g], chosen)
    return chosen


@triton.jit
def partial(
    Xs, ws, Ts, ns, x_ts, x_ns, starts, counts, p_scratch,
    WEIGHTED: tl.constexpr, UNIT: tl.constexpr, STEPS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One tile of the triangle over one stretch of rows, to scratch [starts[member] + stretch, tile, BM, BM]."""
    member = tl.program_id(2)
    tile, stretch = tl.program_id(0), tl.program_id(1)
    T, n, count = pick(Ts, member), pick(ns, member), pick(counts, member)
    first = stretch.to(tl.int64) * STEPS * BT
    if (tile < count) & (first < T):
        p_X, x_t = pick(Xs, member), pick(x_ts, member)
        i, j = triangle(tile)
        rows, cols = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)  # of C
        t = first + tl.arange(0, BT)  # int64
        if UNIT:
            p_a = p_X + t[:, None] * x_t + rows[None, :]  # [BT, BM]
            p_b = p_X + t[:, None] * x_t + cols[None, :]
        else:
            x_n = pick(x_ns, member)
            p_a = p_X + t[:, None] * x_t + rows.to(tl.int64)[None, :] * x_n
            p_b = p_X + t[:, None] * x_t + cols.to(tl.int64)[None, :] * x_n
        acc = tl.zeros((BM, BM), dtype=tl.float32)
        for step in range(0, STEPS):
            here = t + step * BT < T
            a = tl.load(p_a, mask=here[:, None] & (rows[None, :] < n), other=0.0)
            b = tl.load(p_b, mask=here[:, None] & (cols[None, :] < n), other=0.0)
            if WEIGHTED:
                w = tl.load(pick(ws, member) + t + step * BT, mask=here, other=0.0).to(tl.float32)
                a = a.to(tl.float32) * w[:, None]
                b = b.to(tl.float32)
            acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
            p_a += BT * x_t
            p_b += BT * x_t
        inner = tl.arange(0, BM)
        p_s = p_scratch + tl.cast(pick(starts, member), tl.int64) + (stretch * count + tile).to(tl.int64) * BM * BM
        tl.store(p_s + inner[:, None] * BM + inner[None, :], acc)


@triton.jit
def flush(
    Cs, ns, starts, counts, stretches, p_scratch,
    STRETCHES: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """C += the partial tiles in the order of their rows, in fp64: BR rows of one tile, and the same mirrored."""
    member = tl.program_id(2)
    tile = tl.program_id(0)
    n, count = pick(ns, member), pick(counts, member)
    if tile < count:
        p_C = pick(Cs, member)
        i, j = triangle(tile)
        inner_r, inner_c = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BM)
        rows, cols = (i * BM + inner_r).to(tl.int64), (j * BM + inner_c).to(tl.int64)
        lower = (rows[:, None] < n) & (rows[:, None] >= cols[None, :])
        p_c = p_C + rows[:, None] * n + cols[None, :]
        acc = tl.load(p_c, mask=lower, other=0.0)
        p_s = p_scratch + tl.cast(pick(starts, member), tl.int64) + tile.to(tl.int64) * BM * BM
        p_s = p_s + inner_r[:, None] * BM + inner_c[None, :]
        mine = pick(stretches, member)
        for s in range(0, STRETCHES):
            if s < mine:
                acc += tl.load(p_s, mask=lower, other=0.0).to(tl.float64)
            p_s += tl.cast(count, tl.int64) * BM * BM
        tl.store(p_c, acc, mask=lower)
        above = (rows[None, :] < n) & (rows[None, :] > cols[:, None])
        tl.store(p_C + cols[:, None] * n + rows[None, :], tl.trans(acc), mask=above)


def run(C: Tensor, X: Tensor, weight: Tensor | None = None) -> Tensor:
    """`C += Xᵀ diag(w) X`: C [n, n] fp64, contiguous, symmetric; X [T, n], any strides; weight [T] or None."""
    gram_update_many([(C, X, weight)])
    return C


def gram_update_many(updates: Sequence[Update]) -> None:
    """Updates (C, X, weight) of any sizes; those alike in device, dtype, weights and layout share launches.

    No two may share a C: they would add to it at once. Raises ValueError if two do, Unsupported for a dtype.
    """
    if len({C.data_ptr() for C, X, _ in updates if X.numel()}) < sum(bool(X.numel()) for _, X, _ in updates):
        raise ValueError("two updates have the same C; join their rows, or update one after the other")
    groups: dict[tuple, list[Update]] = {}
    for C, X, weight in updates:
        if X.numel():
            weights = None if weight is None else weight.to(torch.float32).contiguous()
            alike = (X.device, X.dtype, weight is None, X.stride(1) == 1)
            groups.setdefault(alike, []).append((C, X, weights))
    for (device, dtype, _, _), group in groups.items():
        for start in range(0, len(group), MEMBERS):
            members = group[start : start + MEMBERS]
            with torch.cuda.device_of(members[0][1]):
                _tuned(members, dtype, target_of(device))


def _tuned(members: list[Update], dtype: torch.dtype, target: Target) -> None:
    C, X, weight = max(members, key=lambda update: update[1].numel())
    T, n = X.shape
    chosen = config(T, n, weight is not None, dtype, target)
    products = dtype if weight is None else torch.float32

    def trial(option: Config) -> None:
        _launch([(torch.zeros_like(C), X, weight)], option, target.sms)  # what is measured must not be added

    measured = tables.measure(
        KERNEL, lambda: configs(weight is not None, dtype, target), {"n": n}, products, target, trial
    )
    _launch(members, measured or chosen, target.sms)


def _launch(members: list[Update], chosen: Config, sms: int) -> None:
    """All rows of all members: in one pair of launches, or several where the scratch memory would be too large."""
    entries = sum(tiles(C.shape[0], chosen) for C, _, _ in members) * chosen.BM**2
    rows = ROWS * max(1, SCRATCH // entries)
    for start in range(0, max(X.shape[0] for _, X, _ in members), rows):
        pieces = [
            (C, X[start : start + rows], None if w is None else w[start : start + rows])
            for C, X, w in members
            if X.shape[0] > start
        ]
        _pair(pieces, chosen, sms)


def _pair(members: list[Update], chosen: Config, sms: int) -> None:
    Cs, Xs, ws = zip(*members, strict=True)
    BM, BT = chosen.BM, chosen.BT
    Ts, ns = tuple(X.shape[0] for X in Xs), tuple(X.shape[1] for X in Xs)
    counts = tuple(tiles(n, chosen) for n in ns)
    _, steps = split(max(Ts), sum(counts), BT, sms)
    stretches = tuple(triton.cdiv(T, steps * BT) for T in Ts)
    starts, total = [], 0
    for count, stretch in zip(counts, stretches, strict=True):
        starts.append(total)
        total += count * stretch * BM**2
    scratch = torch.empty(total, dtype=torch.float32, device=Xs[0].device)
    weighted, unit = ws[0] is not None, Xs[0].stride(1) == 1
    partial[(max(counts), max(stretches), len(members))](
        Xs, ws if weighted else Xs, Ts, ns, tuple(X.stride(0) for X in Xs), tuple(X.stride(1) for X in Xs),
        tuple(starts), counts, scratch,
        WEIGHTED=weighted, UNIT=unit, STEPS=steps, BM=BM, BT=BT,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip
    BR = min(FLUSH, BM)
    flush[(max(counts), BM // BR, len(members))](
        Cs, ns, tuple(starts), counts, stretches, scratch, STRETCHES=max(stretches), BM=BM, BR=BR, num_warps=BM // 16
    )


def cases(target: Target) -> list[Case]:
    """`partial` in every dtype and weighted, for one update and for several, and `flush`, at n = 768."""

    @where_taken
    def adds(type_: str, sm_80: int, sm_90: int, weighted: bool = False, members: int = 1) -> Case:
        dtype = DTYPES[type_]
        chosen = config(12608, 768, weighted, dtype, target)
        half = not weighted and type_ != "fp32"
        types: dict[str, str | tuple[str, ...]] = {
            "Xs": (f"*{type_}",) * members,
            "ws": ("*fp32" if weighted else f"*{type_}",) * members,
            "p_scratch": "*fp32",
            **dict.fromkeys(("Ts", "ns", "x_ts", "x_ns", "starts", "counts"), ("i32",) * members),
        }
        return Case(
            f"{KERNEL} {type_}{' weighted' * weighted}{f', {members} updates' * (members > 1)}",
            partial,
            types,
            {"WEIGHTED": weighted, "UNIT": True, "STEPS": 64, "BM": chosen.BM, "BT": chosen.BT},
            chosen.num_warps,
            chosen.num_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            ("p_scratch", *(f"{name}.{g}" for name in ("Xs", "ws", "ns", "x_ts", "starts") for g in range(members))),
            tensor_cores=half,
            shared=chosen.shared(2 if half else 4),
        )

    @where_taken
    def flushes() -> Case:
        chosen = config(12608, 768, False, torch.bfloat16, target)
        types: dict[str, str | tuple[str, ...]] = {"Cs": ("*fp64",), "p_scratch": "*fp32"}
        return Case(
            f"{KERNEL} flush",
            flush,
            {**types, **dict.fromkeys(("ns", "starts", "counts", "stretches"), ("i32",))},
            {"STRETCHES": 6, "BM": chosen.BM, "BR": min(FLUSH, chosen.BM)},
            chosen.BM // 16,
            3,
            {"sm_80": 96, "sm_90": 96},
            ("Cs.0", "p_scratch", "ns.0", "starts.0"),
            tensor_cores=False,
            shared=chosen.shared(2),
        )

    return [
        *adds("bf16", 176, 124),
        *adds("fp16", 176, 124),
        *adds("bf16", 176, 124, members=4),
        *adds("fp32", 170, 170),
        *adds("bf16", 170, 170, weighted=True),
        *flushes(),
    ]
