"""`C += Xᵀ diag(w) X`: the symmetric Gram update by which calibration accumulates second moments.

A Gram matrix has `n (n + 1) / 2` different entries, so a kernel that skips the lower triangle does half the work of a
GEMM. Products are taken in fp32 (fp64 for fp64 rows) over a bounded number of rows and accumulated in fp64: what is
added later is not lost against what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import define
from vitlr.ops.linalg.triangles import length, triangle

OP = "gram_update_"
ROWS = 4096  # rows whose products are summed in fp32; also bounds the fp32 copy of half-precision rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Key(NamedTuple):
    """What dispatch knows of a call."""

    T: int
    n: int
    weighted: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def gram_update_(C: Tensor, X: Tensor, weight: Tensor | None = None) -> None:
    """`C += Xᵀ diag(w) X` in place: C [n, n] fp64, contiguous and symmetric; X [T, n], any strides; w [T] ≥ 0 or None.

    C may be its upper triangle `[n (n + 1) / 2]` (`ops.linalg.triangles`): the other one need not be written then. Rows
    in fp32, bf16 and fp16 are multiplied in fp32, rows in fp64 in fp64; the sum is in fp64 and C stays exactly
    symmetric. Not differentiable. Raises InputError for shapes, dtypes, layouts or devices that do not fit, and on the
    CPU for a negative weight (elsewhere looking would wait for the device).
    """
    torch.ops.vitlr.gram_update_.default(C, X.detach(), None if weight is None else weight.detach())


def reference(C: Tensor, X: Tensor, weight: Tensor | None = None) -> Tensor:
    """The specification, in plain torch; returns C."""
    with exact_products(X.device):
        for P in products(X, weight):
            # A GEMM's two triangles need not round alike.
            C += triangle(P) if C.dim() == 1 else P.triu() + P.triu(1).mT
    return C


def products(X: Tensor, weight: Tensor | None) -> Iterator[Tensor]:
    """`xᵀ diag(w) x` of ROWS rows at a time, in fp32, or fp64 for fp64 rows."""
    if X.device.type == "cuda" and X.dtype in (torch.bfloat16, torch.float16) and weight is None:
        # Products of halves are exact in fp32, in which tensor cores sum them: no copy of the rows in fp32.
        yield from (torch.mm(x.mT, x, out_dtype=torch.float32) for x in X.split(ROWS))
        return
    for x, w in blocks(X, weight):
        yield (x if w is None else x * w[:, None]).mT @ x


def blocks(X: Tensor, weight: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows of X and their weights, ROWS at a time, in the dtype of the products."""
    dtype = X.dtype if X.dtype == torch.float64 else torch.float32
    for i, x in enumerate(X.split(ROWS)):
        yield x.to(dtype), None if weight is None else weight[i * ROWS : (i + 1) * ROWS].to(dtype)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32: neither an autocast region nor a user's TF32 or bf16 setting reaches them."""
    matmul = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    with ExitStack() as stack:
        if device.type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.callback(setattr, matmul, "fp32_precision", before)
        matmul.fp32_precision = "ieee"
        yield


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`T n (n + 1)` FLOPs (one triangle) over X read once and C read and written once: the floor in µs.

    At the peak of X's dtype, whose products are exact in fp32; weighted rows `w x` need fp32 and take longer.
    """
    T, n = key.T, key.n
    return registry.Roofline.of(T * n * (n + 1), key.dtype.itemsize * T * n + 2 * 8 * n * n, key.dtype, ceilings)


def _check(C: Tensor, X: Tensor, weight: Tensor | None = None) -> None:
    if X.dim() != 2 or X.dtype not in DTYPES:
        raise InputError(f"{OP}: X is {list(X.shape)} {X.dtype}, expected [T, n] in fp32, bf16, fp16 or fp64")
    T, n = X.shape
    if C.shape not in ((n, n), (length(n),)) or C.dtype != torch.float64 or not C.is_contiguous():
        layout = "" if C.is_contiguous() else ", not contiguous"
        raise InputError(
            f"{OP}: C is {list(C.shape)} {C.dtype}{layout}, "
            f"expected [{n}, {n}] or [{length(n)}] torch.float64, contiguous"
        )
    if weight is not None and (weight.shape != (T,) or weight.dtype not in DTYPES):
        raise InputError(f"{OP}: weight is {list(weight.shape)} {weight.dtype}, expected [{T}] in a floating dtype")
    for name, tensor in (("C", C), ("weight", weight)):
        if tensor is not None and tensor.device != X.device:
            raise InputError(f"{OP}: {name} is on {tensor.device}, X on {X.device}")


def _run(C: Tensor, X: Tensor, weight: Tensor | None = None) -> None:
    _check(C, X, weight)
    if weight is not None and weight.device.type == "cpu" and bool((weight < 0).any()):
        raise InputError(f"{OP}: weight has a negative entry ({weight.min().item():g}), expected all ≥ 0")
    T, n = X.shape
    registry.select(OP, Key(T, n, weight is not None, X.dtype, X.device)).run(C, X, weight)


define(
    "gram_update_(Tensor(a!) C, Tensor X, Tensor? weight) -> ()",
    fake=_check,
    run=_run,
    flops=lambda C, X, weight=None: roofline(Key(*X.shape)).flops,
)
registry.register_op(OP, Key, roofline, registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",)))
