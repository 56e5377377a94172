"""Making an attention narrower for good: value channels, whole heads with them, directions of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.anatomy.attention import Attention, loses_heads, set_heads
from vitlr.decomposition.query_key_widths import QueryKeySpectrum
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.runtime.modules import put


@torch.no_grad()
def narrow_attention(
    model: nn.Module, attention: Attention, keep: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Keep the channels `keep [h]` (increasing) of the heads side by side and remove the others, in place.

    Channel j of a head is `softmax(q kᵀ) v_j`, so row j of v and column j of the projection go; rows of q and k go with
    the last channel of their head. Where whole heads go and the module allows it (`loses_heads`), it gets fewer heads
    and smaller plain linears; else zeros stand for what is gone (`SelectedLinear`). `weight [N, h]` and `bias [N]`
    replace those of a dense projection, to make up for the channels removed.

    Raises `InputError`, and changes nothing, for layers that are neither linears nor low-rank, and shapes that do not
    fit.
    """
    keep = _checked(model, attention, keep, weight, bias)
    if len(keep) == attention.width:
        return
    module = model.get_submodule(attention.name)
    fewer = attention.whole(keep) and loses_heads(module)
    for name, rows in attention.rows(keep).items():
        linear = model.get_submodule(name)
        if len(rows) < int(linear.out_features):  # type: ignore[arg-type]
            _put(model, name, SelectedLinear.from_linear(linear, outputs=rows), fewer)
    output = SelectedLinear.from_linear(model.get_submodule(attention.output), inputs=keep)
    for key, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            old = getattr(output.linear, key)
            new = value.detach().to(device=old.device, dtype=old.dtype, copy=True).contiguous()
            setattr(output.linear, key, nn.Parameter(new, requires_grad=old.requires_grad))
    _put(model, attention.output, output, fewer)
    if fewer:
        set_heads(module, len(keep) // attention.head_dim)


def _put(model: nn.Module, name: str, selected: SelectedLinear, alone: bool) -> None:
    """The layer in its place: what is left of it alone, or with the channels around it that it stands in for."""
    put(model, name, selected.linear if alone else selected)


def _checked(
    model: nn.Module, attention: Attention, keep: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The channels, if everything fits."""
    for name in attention.linears:
        linear = model.get_submodule(name)
        if type(linear) not in (nn.Linear, LowRankLinear):
            raise InputError(f"{name} is a {type(linear).__name__}, neither a plain linear nor a low-rank one")
    keep = keep.to(device="cpu", dtype=torch.int64)  # the model may be on the meta device
    fits = keep.ndim == 1 and len(keep) and keep[0] >= 0 and keep[-1] < attention.width
    if not fits or bool((keep.diff() <= 0).any()):
        raise InputError(f"{attention.name}: expected increasing channels from 0 to {attention.width - 1}")
    output = model.get_submodule(attention.output)
    if (weight is not None or bias is not None) and not isinstance(output, nn.Linear):
        raise InputError(f"{attention.output} is of low rank; new weights are for a dense one")
    expected = {"weight": (int(output.out_features), len(keep)), "bias": (int(output.out_features),)}  # type: ignore[arg-type]
    for key, value in (("weight", weight), ("bias", bias)):
        if value is not None and (tuple(value.shape) != expected[key] or getattr(output, key) is None):
            raise InputError(f"{attention.output}: {key} is {list(value.shape)}, expected {list(expected[key])}")
    return keep


@torch.no_grad()
def narrow_query_keys(model: nn.Module, spectrum: QueryKeySpectrum, width: int) -> None:
    """Rotate queries and keys of every head, and take the directions that go out of their linears, in place."""
    attention, full = spectrum.attention, spectrum.full_width
    linears = {name: _plain(model, name) for name in attention.queries_keys}
    rows = torch.cat([_with_bias(linear) for linear in linears.values()])  # of q, of k, and of v where one makes all
    kept = spectrum.places(width)
    if not attention.turned:  # else they stay what they are
        behind = model.get_parameter(attention.bias) if attention.bias else None
        if behind is not None:
            rows[:full, -1] = behind
        rows[: 2 * full] = _rotated(rows[: 2 * full].view(2, -1, attention.head_dim, rows.shape[1]), spectrum).flatten(
            0, 2
        )
        if behind is not None:
            module, key = model.get_submodule(attention.name), attention.bias.rpartition(".")[2]
            new = torch.zeros_like(behind).index_copy(0, kept.to(behind.device), rows[kept, -1].to(behind))
            setattr(module, key, nn.Parameter(new, requires_grad=behind.requires_grad))
    left = torch.cat([kept, full + kept, torch.arange(2 * full, len(rows))])
    start = 0
    for name, linear in linears.items():
        stop = start + linear.out_features
        own = left[(left >= start) & (left < stop)]
        selected = SelectedLinear.from_linear(linear, outputs=own - start)
        assert isinstance(selected.linear, nn.Linear)
        selected.linear.weight.copy_(rows[own, :-1])  # a copy: whoever shares the old weight keeps it
        if selected.linear.bias is not None:
            selected.linear.bias.copy_(rows[own, -1])
        put(model, name, selected)
        start = stop


def _rotated(rows: Tensor, spectrum: QueryKeySpectrum) -> Tensor:
    """Queries and keys `[2, heads, d, K + 1]` in the directions of their head, the ones that matter first."""
    q, k = spectrum.Q @ rows[0], spectrum.P.mT @ rows[1]
    scale = (k.norm(dim=2) / q.norm(dim=2).clamp_min(1e-30)).clamp(1e-6, 1e6).sqrt()[..., None]  # calm half precision
    return torch.stack([q * scale, k / scale])


def _plain(model: nn.Module, name: str) -> nn.Linear:
    """A linear by name, if it is one and no more."""
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise InputError(f"{name} is a {type(linear).__name__}, no plain linear")
    return linear


def _with_bias(linear: nn.Linear) -> Tensor:
    """`[W, b]` in float64 on the CPU."""
    weight = linear.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().cpu()
    return torch.cat([weight, bias[:, None]], 1)
