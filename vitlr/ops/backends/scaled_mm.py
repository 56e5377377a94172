"""`fp8_chain` by torch's own product of 8-bit floats, on a GPU cuBLASLt's; what lies between them is plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.ops.dispatch import registry
from vitlr.ops.layers import fp8_chain
from vitlr.ops.layers.activations import ACTIVATIONS

_STEP = 16  # what K and N have to be multiples of


def objection(key: fp8_chain.Key) -> str | None:
    """Why torch's product does not take a call, or None."""
    if any(width % _STEP for width in key.widths):
        return f"widths {list(key.widths)}, expected multiples of {_STEP}"
    if key.device.type == "cuda":
        if key.dtype != torch.bfloat16:
            return f"x is {key.dtype}: with a scale a row the product ends in torch.bfloat16"
        if torch.cuda.get_device_capability(key.device) < (8, 9):
            return "8-bit floats are multiplied from compute capability 8.9 on"
    elif key.device.type != "cpu" or key.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {key.dtype} on {key.device.type}"
    return None


def run(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None],
    reaches: Sequence[Tensor], residual: Tensor | None, acts: Sequence[str], norm: Sequence[Tensor] = (),
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The arguments and the result of the op. Products end in x's dtype, where the reference keeps fp32 to the end."""
    y = x.reshape(-1, x.shape[-1])
    if norm:
        gamma, beta = (t.float() for t in norm)
        y = F.layer_norm(y.float(), y.shape[-1:], gamma, beta, eps)
    reach = y.abs().amax(-1, keepdim=True)
    for W, scale, bias, (rows, most), act in zip(codes, scales, biases, reaches, acts, strict=True):
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=torch.float32)
        s = fp8_chain.scale_of(reach)
        q = (y.float() / s).to(fp8_chain.FP8)
        p = torch._scaled_mm(q, W.mT, s, scale[None], out_dtype=x.dtype)
        y = ACTIVATIONS[act][0](p if bias is None else p + bias.to(x.dtype))
        reach = torch.ones_like(length) if act == "sigmoid" else length * rows + most
    y = y.unflatten(0, x.shape[:-1])
    return y if residual is None else y + residual


registry.register(fp8_chain.OP, registry.Candidate("torch.scaled_mm", objection, run, ran_on=("CPU",)))
