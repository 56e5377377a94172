"""`Y = W C Wᵀ` for a batch, Y symmetric: two launches of one batched matrix product.

`P = W C` over all tiles, then `Y = P Wᵀ` over the tiles of the lower triangle only; each tile of Y is stored twice, as
it is and mirrored, so that Y is exactly symmetric. One program owns one BM x BM tile and walks over k. P [b, m, k] goes
through L2: fusing it away would compute `W C` once per column of tiles.

Products in fp64 run on the tensor cores from sm_80 on (`mma.sync ... f64`), in fp32 on the FMA units (IEEE, no TF32).
Floor: `2 b m k² + b m (m + 1) k` FLOPs; W, C and Y once each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .compilation import Case, where_taken
from .symmetric import triangle
from .targets import Target, Unsupported, target_of
from .tiles import fitting

KERNEL = "weighted_gram_chain"
SMALLER = (("num_stages", 2), ("num_stages", 1))
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Tiles of BM x BM, BK deep."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory a block: two operand tiles per stage, later the tile that is turned over."""
        return itemsize * self.BM * max(2 * self.BK * self.num_stages, self.BM)


def config(b: int, m: int, k: int, dtype: torch.dtype, target: Target) -> Config:
    """The tiles for `[b, m, k]`. Raises Unsupported for a dtype, or an architecture without fp64 tensor cores."""
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"W is {dtype}, taken are torch.float32 and torch.float64")
    if dtype == torch.float64 and target.name not in ("sm_80", "sm_90", "sm_100", "interpreter"):
        raise Unsupported(f"W is torch.float64 on {target.name}, taken are sm_80, sm_90 and sm_100 (fp64 tensor cores)")
    row = tables.nearest(KERNEL, target, dtype, m=m, k=k)
    chosen = Config(**row) if row else Config(64, 16, 4, 2)
    return fitting(chosen, SMALLER, lambda option: option.shared(dtype.itemsize), target)


def configs(dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit."""
    every = [Config(BM, BK, w, s) for BM, w in ((32, 4), (64, 4), (64, 8), (128, 8)) for BK in (16, 32) for s in (2, 3)]
    return [c for c in every if c.shared(dtype.itemsize) <= target.shared_memory]


def tiles(b: int, m: int, k: int, chosen: Config) -> int:
    """Programs of the two launches."""
    rows = triton.cdiv(m, chosen.BM)
    return b * (rows * triton.cdiv(k, chosen.BM) + rows * (rows + 1) // 2)


@triton.jit
def product(
    p_X, p_Y, p_out, M, N,
    x_b, x_m, x_k, y_b, y_k, y_n, o_b, o_m, o_n,
    K: tl.constexpr, TRIANGLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out = X Y of one batch member: X [M, K], Y [K, N]; TRIANGLE: the lower triangle of a symmetric out, mirrored.

    K is a constant: a model has few sizes, a `while` is not pipelined, and a range over an argument does not run in the
    interpreter of Triton 3.6.
    """
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if TRIANGLE:
        i, j = triangle(tile)
    else:
        columns = tl.cdiv(N, BM)
        i, j = tile // columns, tile % columns
    rows = i.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    cols = j.to(tl.int64) * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK).to(tl.int64)
    p_x = p_X + batch * x_b + rows[:, None] * x_m + depth[None, :] * x_k  # [BM, BK]
    p_y = p_Y + batch * y_b + depth[:, None] * y_k + cols[None, :] * y_n  # [BK, BM]
    acc = tl.zeros((BM, BM), dtype=DTYPE)
    for start in range(0, K, BK):
        x = tl.load(p_x, mask=(rows[:, None] < M) & (start + depth[None, :] < K), other=0.0)
        y = tl.load(p_y, mask=(start + depth[:, None] < K) & (cols[None, :] < N), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee", out_dtype=DTYPE)
        p_x += BK * x_k
        p_y += BK * y_k
    p_o = p_out + batch * o_b
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if TRIANGLE:  # the tiles on the diagonal hold both halves, and those need not round alike
        tl.store(p_o + rows[:, None] * o_m + cols[None, :] * o_n, acc, mask=inside & (rows[:, None] >= cols[None, :]))
        above = (rows[None, :] < M) & (cols[:, None] < N) & (rows[None, :] > cols[:, None])
        tl.store(p_o + cols[:, None] * o_m + rows[None, :] * o_n, tl.trans(acc), mask=above)
    else:
        tl.store(p_o + rows[:, None] * o_m + cols[None, :] * o_n, acc, mask=inside)


def run(W: Tensor, C: Tensor) -> Tensor:
    """W [b, m, k], C [b, k, k] -> W C Wᵀ [b, m, m]; any strides."""
    b, m, k = W.shape
    if not b or not m or not k:
        return W.new_zeros(b, m, m)
    target = target_of(W.device)
    chosen = config(b, m, k, W.dtype, target)
    options, sizes = partial(configs, W.dtype, target), {"m": m, "k": k}
    with torch.cuda.device_of(W):
        measured = tables.measure(KERNEL, options, sizes, W.dtype, target, partial(_launch, W, C))
        return _launch(W, C, measured or chosen)


def _launch(W: Tensor, C: Tensor, chosen: Config) -> Tensor:
    b, m, k = W.shape
    P = torch.empty((b, m, k), dtype=W.dtype, device=W.device)
    Y = torch.empty((b, m, m), dtype=W.dtype, device=W.device)
    rows, columns = triton.cdiv(m, chosen.BM), triton.cdiv(k, chosen.BM)
    constants: dict[str, Any] = {
        "K": k,
        "BM": chosen.BM,
        "BK": chosen.BK,
        "DTYPE": tl.float64 if W.dtype == torch.float64 else tl.float32,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    product[(rows * columns, b)](W, C, P, m, k, *W.stride(), *C.stride(), *P.stride(), TRIANGLE=False, **constants)
    V = W.mT
    product[(rows * (rows + 1) // 2, b)](
        P, V, Y, m, m, *P.stride(), *V.stride(), *Y.stride(), TRIANGLE=True, **constants
    )
    return Y


def cases(target: Target) -> list[Case]:
    """Both launches in both dtypes at n = 768, the second also for `Lᵀ M L`, where the rows of W are columns of L."""
    # Registers on sm_80 and sm_90, of Triton 3.6 and 3.9; 3.8 takes 145 for fp64 where W is read transposed on sm_80.
    # Either way one block of 256 threads fits a processor (two would need 128).
    bounds = {torch.float64: 145, torch.float32: 172}
    strides = ("x_b", "x_m", "x_k", "y_b", "y_k", "y_n", "o_b", "o_m", "o_n")

    @where_taken
    def case(kind: Any, launch: str, ones: tuple[str, ...]) -> Case:
        dtype = torch.float64 if kind == tl.float64 else torch.float32
        chosen = config(48, 768, 768, dtype, target)
        types = {p: f"*{kind}" for p in ("p_X", "p_Y", "p_out")} | dict.fromkeys(("M", "N", *strides), "i32")
        constants = {"K": 768, "TRIANGLE": launch != "W C", "BM": chosen.BM, "BK": chosen.BK, "DTYPE": kind}
        return Case(
            f"{KERNEL} {kind} {launch}",
            product,
            {name: type_ for name, type_ in types.items() if name not in ones},
            constants | dict.fromkeys(ones, 1),
            chosen.num_warps,
            chosen.num_stages,
            dict.fromkeys(("sm_80", "sm_90"), bounds[dtype]),
            tuple(name for name in types if name not in ones),
            # fp64 has mma.sync on every architecture; fp32 in IEEE has no tensor cores at all
            tensor_cores=dtype == torch.float64 and target.name == "sm_80",
            shared=chosen.shared(dtype.itemsize),
        )

    launches = (
        ("W C", ("x_k", "y_n", "o_n")),
        ("P Wᵀ", ("x_k", "y_k", "o_n")),
        ("P Wᵀ, W transposed", ("x_k", "y_n", "o_n")),
    )
    return [found for kind in (tl.float64, tl.float32) for launch in launches for found in case(kind, *launch)]
