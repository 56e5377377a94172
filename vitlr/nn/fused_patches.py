"""The convolution that makes tokens of patches, as the linear of their pixels that it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._fused import StandIn, with_children
from vitlr.nn._plain import foreign_weight, has_hooks, is_transformed

_LEAST = 8  # pixels of a row of a patch: shorter rows take longer to copy than the linear saves


class FusedPatches(StandIn, nn.Conv2d):
    """`y[n, :, i, j] = W x[n, :, p i : p i + p, q j : q j + q] + b`, of patches of p x q pixels that lie side by side.

    x [B, C, H, W] -> y [B, N, H // p, W // q]. In bfloat16 on a CPU pixels are copied patch by patch and one linear
    multiplies them all, which takes 0.6 to 0.85 of the convolution's time; everywhere else it is that convolution. Its
    parameters are those of the `nn.Conv2d` that it stands for, under their names. Raises InputError with the reason of
    `why_not`.
    """

    def __init__(self, conv: nn.Module) -> None:
        if (reason := self.why_not(conv)) is not None:
            raise InputError(f"{type(conv).__name__} cannot become a {type(self).__name__}: {reason}")
        nn.Module.__init__(self)  # not that of nn.Conv2d, which would draw weights
        empty = with_children(conv, {})
        empty._parameters.update(dict.fromkeys(empty._parameters))
        self.__dict__.update({**with_children(conv, {}).__dict__, "original": empty})

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become a FusedPatches with the same outputs, or gains nothing by it; None if it can."""
        if type(module) is not nn.Conv2d:
            return f"{type(module).__qualname__} is not exactly nn.Conv2d"
        plain = {*module.dilation, module.groups} == {1} and (module.padding == "valid" or set(module.padding) == {0})
        if module.stride != module.kernel_size or not plain:
            return "it reads patches that overlap, lie apart or are padded, or not all of their channels"
        if module.kernel_size[1] < _LEAST:
            return f"its patches are less than {_LEAST} pixels wide"
        if (foreign := foreign_weight(module)) is not None:
            return f"it holds a {foreign}, no plain weight"
        return "it has hooks" if has_hooks(module) else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        return self._dispatched(x)

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        fits = x.dim() == 4 and x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == "cpu"
        if not fits or is_transformed() or foreign_weight(self) is not None:
            return self._conv_forward(x, self.weight, self.bias)
        (p, q), (height, width) = self.kernel_size, x.shape[2:]
        rows, columns = height // p, width // q
        if x.shape[1] != self.in_channels or not rows or not columns:
            return self._conv_forward(x, self.weight, self.bias)  # which says what does not fit
        pixels = x[..., : rows * p, : columns * q].unflatten(2, (rows, p)).unflatten(4, (columns, q))
        tokens = pixels.permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, self.weight[0].numel())
        return F.linear(tokens, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (rows, columns))

    def back(self) -> nn.Module:
        """The convolution with the parameters of now."""
        conv = with_children(self.original, {})
        conv._parameters.update(self._parameters)
        return conv.train(self.training)
