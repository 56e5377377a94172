"""Folding: multiply what stands beside a low-rank or int8 layer into it, where that changes nothing.

    LayerNorm  n(x) γ + β  then  A B x + b     becomes  n(x)      then  A (B γ) x + (b + A B β)
    A B x + b  then a layer scale  γ ⊙ y       becomes  (γ A) B x + γ b
    s ⊙ (W q) + b  then a layer scale          becomes  |γ| s ⊙ (sign(γ) W q) + γ b

The norm keeps its parameters, as ones and zeros, and so does the scale: state_dict keys do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.nn import FoldedScale, Fp8Linear, Int8Linear, LowRankLinear
from vitlr.nn._plain import has_hooks, is_plain
from vitlr.runtime.modules import put


@torch.no_grad()
def fold(model: nn.Module) -> list[str]:
    """Fold norms and layer scales into the layers beside them, in place; the names of what was folded.

    Left as they are: what has hooks, what is shared with another layer, values that are not finite, and a norm with a
    shift before a layer without bias. In exact arithmetic the function is the same; the factors are rounded once.
    """
    folded, users = [], _users(model)
    for name, consumers in linears.norms_before(model):
        if _fold_norm(model.get_submodule(name), [model.get_submodule(low) for low in consumers], users):
            folded.append(name)
    for name, producer in linears.scales_after(model):
        scale, low = model.get_submodule(name), model.get_submodule(producer)
        if isinstance(scale, FoldedScale) or not _free(low, users) or not _free(scale, users):
            continue
        gamma = scale.get_parameter("gamma")
        if not torch.isfinite(gamma).all():
            continue
        if isinstance(low, (Int8Linear, Fp8Linear)):
            low.multiply(gamma)
        else:
            assert isinstance(low, LowRankLinear)
            _set(low.up.weight, gamma.double()[:, None] * low.up.weight.double())
            if low.up.bias is not None:
                _set(low.up.bias, gamma.double() * low.up.bias.double())
        put(model, name, FoldedScale(scale))
        folded.append(name)
    return folded


def _fold_norm(norm: nn.Module, consumers: list[nn.Module], users: dict[int, int]) -> bool:
    """Fold a norm into all the layers that it feeds, or into none of them."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or not _free(norm, users):
        return False
    gamma, beta = norm.weight.double(), None if norm.bias is None else norm.bias.double()
    shifted = beta is not None and bool(beta.any())
    if not torch.isfinite(gamma).all() or (beta is not None and not torch.isfinite(beta).all()):
        return False
    lows = [low for low in consumers if isinstance(low, LowRankLinear) and _free(low, users)]
    if len(lows) < len(consumers) or (shifted and any(low.up.bias is None for low in lows)):
        return False
    for low in lows:
        if shifted:
            assert beta is not None
            _set(low.up.bias, low.up.bias.double() + low.up.weight.double() @ (low.down.weight.double() @ beta))
        _set(low.down.weight, low.down.weight.double() * gamma)
    norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()
    return True


def _free(module: nn.Module, users: dict[int, int]) -> bool:
    """Whether a module may change: nobody listens to it, and its parameters are nobody else's."""
    if has_hooks(module) or any(users[id(p)] > 1 for p in (*module.parameters(), *module.buffers())):
        return False
    return not isinstance(module, LowRankLinear) or (is_plain(module.down) and is_plain(module.up))


def _users(model: nn.Module) -> dict[int, int]:
    """How often each tensor is registered in the model, once for every name of a module that has several."""
    count: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                count[id(tensor)] = count.get(id(tensor), 0) + 1
    return count


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
