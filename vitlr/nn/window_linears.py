"""torchvision's attention in shifted windows whose weights are linears, which can be measured and replaced."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._attend import attend
from vitlr.nn._plain import has_hooks
from vitlr.nn.position_biases import cosines
from vitlr.runtime.modules import class_of

_MODULE = "torchvision.models.swin_transformer"
_SCALED, _COSINE = f"{_MODULE}.ShiftedWindowAttention", f"{_MODULE}.ShiftedWindowAttentionV2"
_MASKED = -100.0  # what is added to scores between regions that the shift brought together


class WindowLinears(nn.Module):
    """`proj(concat_h softmax(s(q_h, k_h) + bias + mask) v_h)` in every window, q, k, v of one linear `qkv`.

    x [B, H, W, C] -> the same shape. `s = q kᵀ / √d`, or with a `logit_scale` the scaled cosine of Swin V2, whose keys
    have no bias: that of `qkv` is zero there. The same function as torchvision's module that it is made of, but for
    rounding, on the parameters of that one, under their names.
    """

    inside = ("qkv", "proj")

    if TYPE_CHECKING:
        qkv: nn.Module
        proj: nn.Module
        relative_position_index: Tensor

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.window_size, self.shift_size = tuple(dense.window_size), tuple(dense.shift_size)  # type: ignore[arg-type]
        self.num_heads: int = dense.num_heads  # type: ignore[assignment]
        self.attention_dropout: float = dense.attention_dropout  # type: ignore[assignment]
        self.dropout: float = dense.dropout  # type: ignore[assignment]
        for own, held in ((self._parameters, dense._parameters), (self._buffers, dense._buffers)):
            own.update(held)  # type: ignore[arg-type]
        self._modules.update(dense._modules)
        if self.cosine:
            self.qkv = _without_bias_of_keys(self.qkv)
        self._dense: tuple[nn.Module, ...] = (dense,)  # a tuple, so that it is no submodule

    @property
    def cosine(self) -> bool:
        """Whether scores are scaled cosines."""
        return "logit_scale" in self._parameters

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why this is not the same for a module, or None."""
        if class_of(module) not in (_SCALED, _COSINE):
            return f"{type(module).__qualname__} is not torchvision's ShiftedWindowAttention"
        for name in ("qkv", "proj"):
            linear = module.get_submodule(name)
            if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
                return f"its {name} is no plain linear"
            if has_hooks(linear):
                return "it has hooks, which would vanish with it"
        return "it has hooks, which would vanish with it" if has_hooks(module) else None

    @classmethod
    def from_dense(cls, dense: nn.Module) -> WindowLinears:
        """The same attention on the same parameters. Raises `InputError` where `why_not` says so."""
        if (reason := cls.why_not(dense)) is not None:
            raise InputError(f"no linears can be made of this attention: {reason}")
        return cls(dense).train(dense.training)

    @property
    def plain(self) -> bool:
        """Whether its linears are ordinary ones, of which torchvision's own module would make the same."""
        linears = type(self.qkv) is nn.Linear and type(self.proj) is nn.Linear
        return linears and not (self.cosine and _has_bias_of_keys(self.qkv))

    def to_dense(self) -> nn.Module:
        """torchvision's own module on these parameters: the one it was made of, if it has them yet."""
        (dense,) = self._dense
        qkv, held = self.qkv, dense.get_submodule("qkv")
        if self.cosine and qkv.weight is held.weight and _same_but_keys(qkv, held):
            qkv = held
        own = {**self._modules, "qkv": qkv}
        if all(dense._modules[name] is module for name, module in own.items()) and all(
            dense._parameters[name] is parameter for name, parameter in self._parameters.items()
        ):
            return dense.train(self.training)
        twin = copy.copy(dense)
        twin.__dict__.update({"_modules": own, "_parameters": {**self._parameters}, "_buffers": {**self._buffers}})
        return twin.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W = x.shape[:3]
        height, width = self.window_size
        x = F.pad(x, (0, 0, 0, -W % width, 0, -H % height))
        rows, columns = x.shape[1:3]
        down = 0 if height >= rows else self.shift_size[0]
        right = 0 if width >= columns else self.shift_size[1]
        grid = (rows // height, height, columns // width, width)
        x = torch.roll(x, (-down, -right), (1, 2)) if down or right else x
        x = x.unflatten(2, grid[2:]).unflatten(1, grid[:2]).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        bias = self._bias()
        if down or right:
            apart = self._apart(grid, down, right, x)  # [windows, 1, tokens, tokens]
            bias = (bias + apart).repeat(B, 1, 1, 1)
        y = self._attend(x, bias)
        y = y.unflatten(1, (height, width)).unflatten(0, (B, grid[0], grid[2])).transpose(2, 3)
        y = y.flatten(3, 4).flatten(1, 2)
        y = torch.roll(y, (down, right), (1, 2)) if down or right else y
        return y[:, :H, :W].contiguous()

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attention inside windows x [B windows, tokens, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.cosine:
            q, k = cosines(q, k, self._parameters["logit_scale"])  # type: ignore[arg-type]
        dropout = self.attention_dropout if self.training else 0.0
        y = attend(self, q, k, v, bias.to(q.dtype), dropout=dropout)
        return F.dropout(self.proj(y), self.dropout, self.training)

    def _bias(self) -> Tensor:
        """What is added to scores for where a token lies to another, [1, heads, tokens, tokens]."""
        tokens = self.window_size[0] * self.window_size[1]
        if self.cosine:
            table = self.get_submodule("cpb_mlp")(self._buffers["relative_coords_table"])
            table = 16 * torch.sigmoid(table.flatten(0, -2))
        else:
            table = self._parameters["relative_position_bias_table"]
        return table[self.relative_position_index].reshape(1, tokens, tokens, -1).permute(0, 3, 1, 2)

    def _apart(self, grid: tuple[int, ...], down: int, right: int, x: Tensor) -> Tensor:
        """0 between tokens of one region, much below it between others, [windows, 1, tokens, tokens]."""
        lines = _regions(grid[0] * grid[1], grid[1], down, x)
        columns = _regions(grid[2] * grid[3], grid[3], right, x)
        region = (3 * lines[:, None] + columns).view(grid).transpose(1, 2).flatten(2).flatten(0, 1)
        return _MASKED * (region[:, None, :, None] != region[:, None, None, :]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


def _regions(size: int, window: int, shift: int, like: Tensor) -> Tensor:
    """0, 1, 2 along one side: before the last window, of it what was there, of it what was rolled in."""
    at = torch.arange(size, device=like.device)
    return (at >= size - window).long() + (at >= size - shift).long()


def _keys(qkv: nn.Linear) -> slice:
    third = qkv.out_features // 3
    return slice(third, 2 * third)


def _has_bias_of_keys(qkv: nn.Module) -> bool:
    assert isinstance(qkv, nn.Linear)
    return qkv.bias is not None and not qkv.bias.is_meta and bool(qkv.bias[_keys(qkv)].any())


def _without_bias_of_keys(qkv: nn.Module) -> nn.Linear:
    """The same linear, on the same weight, with zeros where the bias of keys stood."""
    assert isinstance(qkv, nn.Linear)
    if not _has_bias_of_keys(qkv):
        return qkv
    twin = copy.copy(qkv)
    bias = qkv.bias.detach().clone()
    bias[_keys(qkv)] = 0
    twin._parameters = {**qkv._parameters, "bias": nn.Parameter(bias, qkv.bias.requires_grad)}
    return twin


def _same_but_keys(a: nn.Module, b: nn.Module) -> bool:
    """Whether two linears have one bias, but for keys."""
    if a.bias is None or b.bias is None or a.bias is b.bias:
        return a.bias is b.bias
    assert isinstance(a, nn.Linear)
    differ = a.bias.detach() != b.bias.detach()  # type: ignore[operator]
    differ[_keys(a)] = False
    return not bool(differ.any())
