"""Layers that store no weight, and what their parents may ask of one all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class Shadow:
    """What a parent may ask of a weight that is stored otherwise: dtype, device, shape; it is no tensor.

    Models cast their inputs by `self.fc.weight.dtype`. Whoever computes with it would read past the layer's forward,
    and is told so.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, int]) -> None:
        self.dtype, self.device, self.shape = dtype, device, torch.Size(shape)
        self.ndim, self.is_cuda, self.requires_grad = 2, device.type == "cuda", False

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2."""
        return self.ndim

    def numel(self) -> int:
        """Of the weight that it stands for."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether its dtype is one of fractions."""
        return self.dtype.is_floating_point

    @property
    def data(self) -> Shadow:
        """Itself."""
        return self

    def type(self) -> str:
        """The name of the kind of tensors that it would be one of."""
        return self._empty().type()

    def new_zeros(self, *size: Any, **options: Any) -> Tensor:
        """Zeros on its device and of its dtype, as of a tensor."""
        return self._empty().new_zeros(*size, **options)

    def new_ones(self, *size: Any, **options: Any) -> Tensor:
        """The same of ones."""
        return self._empty().new_ones(*size, **options)

    def new_tensor(self, value: Any, **options: Any) -> Tensor:
        """The value as a tensor on its device and of its dtype."""
        return self._empty().new_tensor(value, **options)

    def _empty(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"this layer stores no weight, so there is no weight.{name}: call the layer, or take the model back with "
            "vitlr.to_dense"
        )

    def __repr__(self) -> str:
        return f"Shadow({list(self.shape)}, {self.dtype}, {self.device})"


class Weightless(nn.Module):
    """A layer [N, K] whose `weight` is a `Shadow`."""

    __jit_unused_properties__ = ("weight", "bias")

    @property
    def weight(self) -> Any:
        """dtype, device and shape of the weight that is not there."""
        stored = next(
            (t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point()), torch.empty(0, device="cpu")
        )
        return Shadow(stored.dtype, stored.device, (int(self.out_features), int(self.in_features)))  # type: ignore[arg-type]


class Fixed(Weightless):
    """A layer whose buffers keep their dtypes: `.to(dtype)` moves them, and leaves every bit of them as it is."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # As integers of their size floats pass through a cast.
        held = {name: t for name, t in self._buffers.items() if t is not None and t.is_floating_point()}
        self._buffers.update({name: t.view(_INTEGERS[t.itemsize]) for name, t in held.items()})
        try:
            super()._apply(fn, recurse)
        finally:
            for name, t in held.items():
                moved = self._buffers[name]
                assert moved is not None
                self._buffers[name] = moved.view(t.dtype)
        return self


_INTEGERS = {1: torch.uint8, 4: torch.int32}
