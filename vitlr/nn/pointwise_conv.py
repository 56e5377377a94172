"""A 1x1 convolution as the linear that it is, which can be measured and replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._plain import has_hooks


class PointwiseConv(nn.Module):
    """`y[n, :, h, w] = W x[n, :, h, w] + b` by the linear `linear`: x [n, K, h, w] -> y [n, N, h, w].

    The same function as the `nn.Conv2d` it is made of, but for rounding; `linear.weight` [N, K] is that one's weight
    seen without its last two dimensions.
    """

    inside = ("linear",)

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self._dense: tuple[nn.Conv2d, ...] = ()  # a tuple, so that it is no submodule

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why a module is no linear of the channels, or None."""
        if type(module) is not nn.Conv2d:
            return f"{type(module).__qualname__} is not exactly nn.Conv2d"
        if {*module.kernel_size, *module.stride, module.groups} != {1} or set(module.padding) not in ({0}, {"valid"}):
            return "it reads more than one place, or not all of the channels there"
        if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            return "its weight is no plain floating-point parameter"
        if has_hooks(module):
            return "it has hooks, which would vanish with it"
        return None

    @classmethod
    def from_dense(cls, dense: nn.Conv2d) -> PointwiseConv:
        """The same convolution on the same numbers. Raises `InputError` where `why_not` says so."""
        if (reason := cls.why_not(dense)) is not None:
            raise InputError(f"no linear can be made of this convolution: {reason}")
        linear = nn.Linear(dense.in_channels, dense.out_channels, dense.bias is not None, device="meta")
        linear.weight = nn.Parameter(dense.weight.detach().flatten(1), dense.weight.requires_grad)
        linear.bias = dense.bias  # type: ignore[assignment]
        made = cls(linear)
        made._dense = (dense,)
        return made.train(dense.training)

    @property
    def weight(self) -> Any:
        """That of `linear`, of which parents ask dtype and device."""
        return self.linear.weight

    @property
    def plain(self) -> bool:
        """Whether its linear is an ordinary one, so that `to_dense` needs nothing but its parameters."""
        return type(self.linear) is nn.Linear

    def to_dense(self) -> nn.Conv2d:
        """A convolution on the numbers of `linear`: the one it was made of, if it has them yet."""
        linear = self.linear
        assert isinstance(linear, nn.Linear)
        for dense in self._dense:
            own = dense.weight.shape[:2] == linear.weight.shape  # on the meta device all lie in one place
            if own and dense.weight.data_ptr() == linear.weight.data_ptr() and dense.bias is linear.bias:
                return dense.train(self.training)
        dense = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
        dense.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], linear.weight.requires_grad)
        dense.bias = linear.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.movedim(-3, -1)).movedim(-1, -3)
        # An activation that writes into this view would take its gradient past whoever listens to the linear.
        return y.clone() if y.requires_grad else y
