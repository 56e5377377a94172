"""A linear layer that multiplies bytes: `y = scale ⊙ (W q) + b`, `q = round(multiplier ⊙ x + shift)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._weightless import Weightless
from vitlr.ops.layers import int8_chain as op

_FLOATS = ("scale", "bias", "multiplier", "shift")
_LARGEST = 127  # of a code


class Int8Linear(Weightless):
    """`y = scale ⊙ (W q) + b` with `q = round(multiplier ⊙ x + shift)` from 0 to 255: x [..., K] -> y [..., N].

    `codes` [N, K] int8; `scale`, `bias` [N], `multiplier`, `shift` [K] in fp32, which `.to(dtype)` and autocast leave
    alone: they say what the integers mean. Column k of x has a step and a zero of its own, `(q - shift) / multiplier`;
    `bias` holds what the zeros add. y is in x's dtype. For running only: there is no gradient.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        for name, size in zip(_FLOATS, (out_features, out_features, in_features, in_features), strict=True):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))

    @property
    def step(self) -> op.Step:
        """What the op takes."""
        return op.Step(self.codes, self.scale, self.bias, self.multiplier, self.shift)

    def forward(self, x: Tensor) -> Tensor:
        return op.int8_chain(x, [self.step], ["none"])

    @classmethod
    @torch.no_grad()
    def from_weight(cls, W: Tensor, bias: Tensor | None, low: Tensor, high: Tensor, mean: Tensor) -> Int8Linear:
        """The layer nearest to `W x + b` for inputs from `low` to `high` [K] with this mean, computed in fp64.

        Every row of `W / multiplier` is rounded to steps of its own; `b += (W - Ŵ) mean` takes out what that moves on
        average. Raises `InputError` for a range that is empty or not finite.
        """
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
            raise InputError("ranges of inputs must be finite and not empty: calibrate again")
        W, low, high, mean = (t.detach().double() for t in (W, low, high, mean))
        multiplier = (op.LARGEST / (high - low)).float()  # as stored: codes are found with what will be used
        shift = (-low * multiplier).float()
        folded = W / multiplier
        scale = (folded.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST).float()
        codes = (folded / scale[:, None]).round().clamp(-_LARGEST, _LARGEST)
        lost = (folded - codes * scale[:, None]) @ (mean * multiplier)
        offset = lost - scale * (codes @ shift.double()) + (0 if bias is None else bias.detach().double())
        layer = cls(W.shape[1], W.shape[0], "meta")
        layer.codes, layer.scale, layer.bias = codes.to(torch.int8), scale, offset.float()
        layer.multiplier, layer.shift = multiplier, shift
        return layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer in fp32 of the same function but for the rounding of x, on the same device."""
        multiplier, scale = self.multiplier.double(), self.scale.double()
        codes = self.codes.double()
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter((codes * scale[:, None] * multiplier).float())
        linear.bias = nn.Parameter((self.bias.double() + scale * (codes @ self.shift.double())).float())
        return linear.train(self.training)

    def check(self, name: str) -> None:
        """Raise `InputError` for codes, steps and shapes that no such layer has."""
        N, K = self.out_features, self.in_features
        shapes: dict[str, tuple[int, ...]] = {"codes": (N, K), "scale": (N,), "bias": (N,)}
        for part in ("codes", *_FLOATS):
            found, shape = getattr(self, part), shapes.get(part, (K,))
            dtype = torch.int8 if part == "codes" else torch.float32
            if found.shape != shape or found.dtype != dtype:
                raise InputError(f"{name}: {part} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        if self.codes.is_meta:
            return
        for part in _FLOATS:
            found = getattr(self, part)
            if not bool(torch.isfinite(found).all()):
                raise InputError(f"{name}: {part} holds what is not finite")
            if part in ("scale", "multiplier") and not bool((found > 0).all()):
                raise InputError(f"{name}: {part} reaches {float(found.min()):.3g}, expected steps above 0")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # Devices change, dtypes do not: as integers the floats pass through `.to(dtype)` bit for bit.
        held = {name: self._buffers[name] for name in _FLOATS}
        self._buffers.update({name: t.view(torch.int32) for name, t in held.items() if t is not None})
        try:
            super()._apply(fn, recurse)
        finally:
            for name in _FLOATS:
                t = self._buffers[name]
                assert t is not None
                self._buffers[name] = t.view(torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Copied, numbers of another dtype would be read as other numbers, without a word.
        for part in ("codes", *_FLOATS):
            given, own = state_dict.get(prefix + part), getattr(self, part)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                raise InputError(f"{prefix}{part} is {given.dtype}, expected {own.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
