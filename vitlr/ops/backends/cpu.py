"""The CPU kernels as candidates: chains of linears on blocks of rows that stay in cache, from packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitlr.ops.backends import native, packed
from vitlr.ops.dispatch import registry
from vitlr.ops.layers import attention, lowrank_linear, lowrank_mlp, lowrank_residual_linear
from vitlr.ops.linalg import gram

_RAN_ON = ("Zen 4 (AVX-512, AVX2)",)
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4, "sigmoid": 5}
_DTYPES = (torch.float32, torch.bfloat16)
_SLOW = "without AVX2 torch's own GEMM is faster"
_MOST_RANK = 256
_OUTDONE = "torch multiplies bf16 in tiles of AMX, this kernel in vectors"


class _Chain:
    """Layers in the form that the native part takes, with everything they point to kept alive."""

    def __init__(self) -> None:
        self.isa = native.isa_used()
        self.layers: list[tuple] = []
        self.kept: list[Any] = []

    def linear(
        self, W: Tensor, bias: Tensor | None = None, act: str = "none", residual: packed.Packed | None = None
    ) -> None:
        """Adds `act(input Wᵀ + first input of the chain · residualᵀ + bias)`."""
        W_packed = packed.weight(W, self.isa)
        bias = None if bias is None else bias.contiguous()
        pointer = 0 if bias is None else bias.data_ptr()
        self.layers.append((W_packed.fields, residual and residual.fields, pointer, ACTIVATIONS[act]))
        self.kept += [W_packed, bias, residual]

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K] through the layers, + residual [..., N]."""
        N = self.layers[-1][0][2]
        if residual is not None:
            residual = residual.reshape(-1, N)
            residual = residual if residual.stride(1) == 1 else residual.contiguous()
        rows = x.reshape(-1, x.shape[-1])
        return native.chain(rows, self.layers, N, residual, self.isa).view(*x.shape[:-1], N)


def _linear(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None, residual: Tensor | None, act: str) -> Tensor:
    chain = _Chain()
    chain.linear(B)
    chain.linear(A, bias, act)
    return chain.run(x, residual)


def _mlp(
    x: Tensor,
    B1: Tensor,
    A1: Tensor | None,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    chain = _Chain()
    for B, A, b, f in ((B1, A1, b1, act), (B2, A2, b2, "none")):
        if A is None:
            chain.linear(B, b, f)
        else:
            chain.linear(B)
            chain.linear(A, b, f)
    return chain.run(x, residual)


def _residual_linear(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    R: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    form: str,
    group_size: int,
) -> Tensor:
    chain = _Chain()
    chain.linear(B)
    chain.linear(A, bias, residual=packed.codes(R, scale, x.shape[-1], group_size, form, chain.isa))
    return chain.run(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (_with_whole_rows(x) for x in (q, k, v))
    if bias is not None:
        bias = _with_whole_rows(bias).expand(*q.shape[:3], -1)
    return native.attention(q, k, v, bias, native.isa_used()).flatten(2)


def _with_whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _gram(C: Tensor, X: Tensor, weight: Tensor | None = None) -> Tensor:
    for x, w in [(X, weight)] if X.dtype == torch.float32 else gram.blocks(X, weight):
        native.gram(C, x, None if w is None else w.to(torch.float32).contiguous())
    return C


def _supports(key: Any) -> str | None:
    if key.device.type != "cpu":
        return f"x is on {key.device}, the kernel runs on the CPU"
    if key.dtype not in _DTYPES:
        return f"it takes fp32 and bf16, x is {key.dtype}"
    if any(value == 0 for name, value in key._asdict().items() if name in ("S", "d", "K", "D", "N", "r", "r1", "r2")):
        return "a size is 0"
    return native.why_not()


def _residual_supports(key: Any) -> str | None:
    if key.form not in packed.FORMS:
        return f"it takes codes of {' and '.join(packed.FORMS)}, R is {key.form}"
    return _supports(key)


def _gram_supports(key: gram.Key) -> str | None:
    if key.device.type != "cpu":
        return f"X is on {key.device}, the kernel runs on the CPU"
    if key.dtype == torch.float64:
        return "the products are in fp32, X is fp64"
    return native.why_not()


def _gram_worth(key: gram.Key) -> str | None:
    return _SLOW if native.best_isa() == "portable" else None


def _too_little(M: int | None, weights: int, dtype: torch.dtype, least: int | None = None) -> str | None:
    """Calls of the op take tens of µs; torch's own fp32 linear starts quickly, its bf16 linear does not."""
    if native.best_isa() == "portable":
        return _SLOW
    least = least or (4_000_000 if dtype == torch.float32 else 100_000)
    if M is not None and M * weights < least:
        return f"it is {M * weights:,} multiplications, below {least:,} a call costs more than the kernel gains"
    return None


def _has_tiles() -> bool:
    """Whether this is a CPU with AMX: of Intel's, on which torch's GEMMs are better than elsewhere."""
    return native.best_isa() == "amx_int8"


def _outdone(dtype: torch.dtype) -> bool:
    """Whether torch has better instructions for products in bf16: every CPU with AMX for bytes has it for bf16."""
    return dtype == torch.bfloat16 and _has_tiles()


def _linear_worth(key: lowrank_linear.Key) -> str | None:
    if _outdone(key.dtype):
        return _OUTDONE
    # Without an activation there is little to gain but one launch and [M, r] in cache, and a panel of 32 columns to
    # lose: torch's GEMM of a very thin factor is better. Measured on Zen 4, see docs/kernels/cpu.md.
    width = 768 if key.dtype == torch.bfloat16 else 384
    if (key.M is not None and key.M < 512) or key.r < 128 or min(key.K, key.N) < width:
        return f"two GEMMs of torch are as fast below 512 rows, below r = 128 and below {width} features"
    return _too_little(key.M, key.r * (key.K + key.N), key.dtype)


def _mlp_worth(key: lowrank_mlp.Key) -> str | None:
    if _outdone(key.dtype):
        return _OUTDONE
    rank = max(key.r1 or 0, key.r2 or 0)
    if key.dtype == torch.float32 and rank > _MOST_RANK:
        return f"above r = {_MOST_RANK} blocks hold few rows, and torch's fp32 GEMMs are as fast"
    if key.dtype == torch.float32 and rank >= 128 and key.M is not None and key.M < 512 and _has_tiles():
        return "from r = 128 on and below 512 rows torch's fp32 GEMMs are faster on CPUs with AMX"
    first = key.K * key.D if key.r1 is None else key.r1 * (key.K + key.D)
    second = key.D * key.N if key.r2 is None else key.r2 * (key.D + key.N)
    too_little = _too_little(key.M, first + second, key.dtype)
    if too_little is None and key.dtype == torch.float32 and key.M is not None and key.M < 128 and key.K < 768:
        return "below 128 rows and 768 features torch's fp32 GEMMs are as fast"
    return too_little


def _residual_worth(key: lowrank_residual_linear.Key) -> str | None:
    # Torch dequantises R [N, K] in every call; the kernel reads a quarter or an eighth of the bytes of W in fp32.
    return _too_little(key.M, key.K * key.N, key.dtype, least=100_000)


def _attention_worth(key: attention.Key) -> str | None:
    if key.dtype == torch.float32 and key.S is not None and key.S < 32:
        return "below 32 keys torch is as fast in fp32"
    work = None if key.M is None or key.S is None else key.M * key.S
    return _too_little(work, 2 * key.d, key.dtype)


for _op, _candidate in (
    (gram.OP, registry.Candidate("cpu", _gram_supports, _gram, _RAN_ON, _gram_worth)),
    (attention.OP, registry.Candidate("cpu", _supports, _attention, _RAN_ON, _attention_worth)),
    (lowrank_linear.OP, registry.Candidate("cpu", _supports, _linear, _RAN_ON, _linear_worth)),
    (lowrank_mlp.OP, registry.Candidate("cpu", _supports, _mlp, _RAN_ON, _mlp_worth)),
    (
        lowrank_residual_linear.OP,
        registry.Candidate("cpu", _residual_supports, _residual_linear, _RAN_ON, _residual_worth),
    ),
):
    registry.register(_op, _candidate)
