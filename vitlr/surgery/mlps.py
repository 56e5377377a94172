"""Removing hidden neurons for good: fewer rows in the first linears, fewer columns in the second, or zeros for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.anatomy.mlps import Mlp, read_mlp
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, ResidualLowRankLinear
from vitlr.runtime.modules import put


@torch.no_grad()
def narrow_mlp(mlp: Mlp | nn.Module, keep: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Keep the hidden neurons `keep [h]` of an MLP and remove the others, in place.

    Rows `keep` of the first linears (gate and value alike) and their biases, columns `keep` of the second stay; where a
    layer is a `LowRankLinear` they are rows of `up` and columns of `down`. Channels `keep` of a depthwise convolution
    or a norm by batch in between stay. `weight` replaces what reads the hidden
    neurons, to make up for those removed: W₂ `[N, h]`, or B₂ `[r, h]` of a low-rank fc2; `bias [N]` likewise replaces
    b₂. A pair whose rank no longer fits becomes the plain linear that it multiplies to.

    Raises `InputError`, and changes nothing, where the module is no such MLP, indices or shapes do not fit, or a layer
    has a residual.
    """
    mlp = mlp if isinstance(mlp, Mlp) else read_mlp(mlp)
    keep = _checked(mlp, keep, weight, bias)
    full, width = mlp.full_width, len(keep)
    rows = mlp.rows(keep)
    for name in mlp.first:
        linear = _ready(mlp, name, len(rows))
        out = linear.up if isinstance(linear, LowRankLinear) else linear
        _replace(out, "weight", out.weight[rows.to(out.weight.device)])
        if out.bias is not None:
            _replace(out, "bias", out.bias[rows.to(out.bias.device)])
        linear.out_features = out.out_features = len(rows)
    for layer in mlp.layers:
        _resize(layer, width)
        for key, value in _by_channel(layer):
            _replace(layer, key, value[keep.to(value.device)])
    second = _ready(mlp, mlp.second, width)
    into, out = (second.down, second.up) if isinstance(second, LowRankLinear) else (second, second)
    _replace(into, "weight", into.weight[:, keep.to(into.weight.device)] if weight is None else weight)
    if bias is not None:
        _replace(out, "bias", bias)
    second.in_features = into.in_features = width
    mlp.mark(full)


@torch.no_grad()
def widen_mlp(mlp: Mlp) -> None:
    """Give an MLP of plain linears its full width back, in place: the neurons that went read and write nothing."""
    full, width = mlp.full_width, mlp.width
    keep, more = torch.arange(width), full - width
    for linear in mlp.fc1:
        assert isinstance(linear, nn.Linear)
        rows = torch.cat([keep, keep + full]) if mlp.packed else keep
        linear.out_features += 2 * more if mlp.packed else more
        for key, size in (("weight", (linear.out_features, linear.in_features)), ("bias", (linear.out_features,))):
            value = getattr(linear, key)
            if value is not None:
                _replace(linear, key, value.new_zeros(size).index_copy(0, rows.to(value.device), value))
    for layer in mlp.layers:
        _resize(layer, full)
        for key, value in _by_channel(layer):
            fill = 1.0 if key == "running_var" else 0.0
            _replace(layer, key, torch.cat([value, value.new_full((more, *value.shape[1:]), fill)]))
    second = mlp.fc2
    assert isinstance(second, nn.Linear)
    second.in_features = full
    _replace(second, "weight", nn.functional.pad(second.weight, (0, more)))
    mlp.unmark()


def _checked(mlp: Mlp, keep: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The indices, if everything fits."""
    label = mlp.name or type(mlp.module).__qualname__
    for name in (*mlp.first, mlp.second):
        linear = mlp.module.get_submodule(name)
        if isinstance(linear, ResidualLowRankLinear):
            raise InputError(f"{label}: {name} has a residual; remove neurons first, then make residuals")
        if type(linear) not in (nn.Linear, LowRankLinear):
            raise InputError(f"{label}: {name} is a {type(linear).__name__}, not a plain linear")
    if keep.dim() != 1 or keep.dtype not in (torch.int64, torch.int32) or not len(keep):
        raise InputError(f"{label}: keep is {keep.dtype} {list(keep.shape)}, expected at least one index [h]")
    keep = keep.to(device="cpu", dtype=torch.int64)  # the model may be on the meta device
    if int(keep.min()) < 0 or int(keep.max()) >= mlp.width or len(keep.unique()) < len(keep):
        raise InputError(f"{label}: keep must name neurons from 0 to {mlp.width - 1}, each at most once")
    fc2 = mlp.fc2
    rank = fc2.rank if isinstance(fc2, LowRankLinear) else None
    shape = (rank if rank is not None else int(fc2.out_features), len(keep))  # type: ignore[arg-type]
    if weight is not None and tuple(weight.shape) != shape:
        raise InputError(f"{label}: weight is {list(weight.shape)}, expected {list(shape)}")
    if weight is not None and rank is not None and rank > len(keep):
        raise InputError(f"{label}: {len(keep)} neurons cannot feed a rank of {rank}; multiply the factors out first")
    old = (fc2.up if isinstance(fc2, LowRankLinear) else fc2).bias
    has = list(old.shape) if isinstance(old, Tensor) else "none"
    if bias is not None and list(bias.shape) != has:
        raise InputError(f"{label}: bias is {list(bias.shape)}, that of its second linear is {has}")
    return keep


def _ready(mlp: Mlp, name: str, limit: int) -> nn.Linear | LowRankLinear:
    """A layer of the MLP, multiplied out where it has a rank above `limit`."""
    linear = mlp.module.get_submodule(name)
    assert isinstance(linear, (nn.Linear, LowRankLinear))
    if isinstance(linear, LowRankLinear) and linear.rank > limit:
        frozen = not linear.up.weight.requires_grad
        linear = linear.to_linear().requires_grad_(not frozen)
        put(mlp.module, name, linear)
    return linear


def _resize(layer: nn.Module, width: int) -> None:
    """As many channels as there are neurons, each on its own."""
    for key in ("in_channels", "out_channels", "groups", "num_features"):
        if hasattr(layer, key):
            setattr(layer, key, width)


def _by_channel(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """What a layer holds for every channel."""
    held = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return [(key, value) for key, value in held if value.ndim]  # not how many batches a norm has seen


def _replace(layer: nn.Module, key: str, value: Tensor) -> None:
    """A new parameter or buffer in place of an old one: of its dtype, device and `requires_grad`."""
    old = getattr(layer, key)
    new = value.detach().to(device=old.device, dtype=old.dtype, copy=True).contiguous()
    setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad) if key in layer._parameters else new)
