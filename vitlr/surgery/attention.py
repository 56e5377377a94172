"""Making an attention narrower for good: value channels, whole heads with them, directions of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.anatomy.attention import Attention, loses_heads, set_heads
from vitlr.decomposition.score_widths import ScoreSpectrum
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
def narrow_scores(model: nn.Module, spectrum: ScoreSpectrum, width: int) -> None:
    """Rotate queries and keys of every head, and take the directions that go out of their linears, in place."""
    for name, (weight, bias, left) in _rotated(model, spectrum, spectrum.ranks(width)).items():
        selected = SelectedLinear.from_linear(model.get_submodule(name), outputs=left)
        assert isinstance(selected.linear, nn.Linear)
        selected.linear.weight.copy_(weight[left])  # a copy: whoever shares the old weight keeps it
        if selected.linear.bias is not None:
            selected.linear.bias.copy_(bias[left])
        put(model, name, selected)


def _rotated(model: nn.Module, spectrum: ScoreSpectrum, ranks: list[int]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight and bias of the linears with rotated rows, in float64, and the rows that are left."""
    names, width, d = spectrum.attention.queries_keys, spectrum.full_width, spectrum.attention.head_dim
    linears = [model.get_submodule(name) for name in names]
    for name, linear in zip(names, linears, strict=True):
        if type(linear) is not nn.Linear:
            raise InputError(f"{name} is a {type(linear).__name__}, no plain linear")
    rows = [torch.cat([_with_bias(linear) for linear in linears])[i * width : (i + 1) * width] for i in (0, 1)]
    q, k = (part.unflatten(0, (-1, d)) for part in rows)  # [heads, d, K + 1]
    q, k = spectrum.Q @ q, spectrum.P.mT @ k
    scale = (k.norm(dim=2) / q.norm(dim=2).clamp_min(1e-30)).clamp(1e-6, 1e6).sqrt()  # calm half precision
    q, k = (q * scale[..., None]).flatten(0, 1), (k / scale[..., None]).flatten(0, 1)
    head = torch.cat([h * d + torch.arange(r) for h, r in enumerate(ranks)])
    if len(names) == 1:
        rest = _with_bias(linears[0])[2 * width :]
        left = torch.cat([head, width + head, torch.arange(2 * width, 3 * width)])
        return {names[0]: (*_apart(torch.cat([q, k, rest])), left)}
    return {name: (*_apart(part), head) for name, part in zip(names, (q, k), strict=True)}


def _with_bias(linear: nn.Module) -> Tensor:
    """`[W, b]` in float64 on the CPU."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().cpu()
    return torch.cat([weight, bias[:, None]], 1)


def _apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, :-1], rows[:, -1]
