"""A linear layer that multiplies bytes: `y = scale ⊙ (W q) + b`, `q = round(multiplier ⊙ x + shift)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._weightless import Fixed
from vitlr.ops.layers import int8_chain as op

_FLOATS = ("scale", "bias", "multiplier", "shift")
_LARGEST = 127  # of a code


class Int8Linear(Fixed):
    """`y = scale ⊙ (W q) + b` with `q = round(multiplier ⊙ x + shift)` from 0 to 255: x [..., K] -> y [..., N].

    `codes` [N, K] int8; `scale`, `bias` [N], `multiplier`, `shift` [K] in fp32, which `.to(dtype)` and autocast leave
    alone: they say what the integers mean. Column k of x has a step and a zero of its own, `(q - shift) / multiplier`;
    `bias` holds what the zeros add. y is in x's dtype. For running only: there is no gradient.
    Channels that are now and then huge have more columns: those at `wide` [R] int32, rising, one for each time that a
    channel has another. K + R are then the columns of codes, multiplier and shift; without such channels it is None.
    """

    CHAIN: ClassVar[Callable[..., Tensor]] = staticmethod(op.int8_chain)

    codes: Tensor
    scale: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    wide: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        wide: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        columns = in_features + wide
        self.register_buffer("codes", torch.zeros(out_features, columns, dtype=torch.int8, device=device))
        for name, size in zip(_FLOATS, (out_features, out_features, columns, columns), strict=True):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))
        self.register_buffer("wide", torch.zeros(wide, dtype=torch.int32, device=device) if wide else None)

    @property
    def step(self) -> op.Step:
        """What the op takes."""
        return op.Step(*map(self._buffers.get, op.Step._fields))  # type: ignore[arg-type] # past a slow __getattr__

    def forward(self, x: Tensor) -> Tensor:
        return op.int8_chain(x, [self.step], ["none"])

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls,
        W: Tensor,
        bias: Tensor | None,
        low: Tensor,
        high: Tensor,
        mean: Tensor,
        times: Tensor | None = None,
    ) -> Int8Linear:
        """The layer nearest to `W x + b` for inputs from `low` to `high` [K] with this mean, computed in fp64.

        Every row of `W / multiplier` is rounded to steps of its own; `b += (W - Ŵ) mean` takes out what that moves on
        average. Channel k has `times` [K] columns, one unless told, and as many times 255 steps.
        Raises `InputError` for a range that is empty or not finite.
        """
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
            raise InputError("ranges of inputs must be finite and not empty: calibrate again")
        W, low, high, mean = (t.detach().double() for t in (W, low, high, mean))
        times = torch.ones_like(low, dtype=torch.int64) if times is None else times.to(low.device)
        multiplier = (op.LARGEST * times / (high - low)).float()  # as stored: codes are found with what will be used
        shift = (-low * multiplier).float()
        folded = W / multiplier
        scale = (folded.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST).float()
        codes = (folded / scale[:, None]).round().clamp(-_LARGEST, _LARGEST)
        lost = (folded - codes * scale[:, None]) @ (mean * multiplier)
        offset = lost - scale * (codes @ shift.double()) + (0 if bias is None else bias.detach().double())
        K = torch.arange(len(low), device=low.device)
        wide = K.repeat_interleave(times - 1)
        columns = torch.cat([K, wide])
        layer = cls(W.shape[1], W.shape[0], "meta", wide=len(wide))
        layer.codes, layer.scale, layer.bias = codes.to(torch.int8)[:, columns], scale, offset.float()
        layer.multiplier, layer.shift = multiplier[columns], torch.cat([shift, further(shift, wide)])
        layer.wide = wide.to(torch.int32) if len(wide) else None
        return layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer in fp32 of the same function but for the rounding of x, on the same device."""
        K = self.in_features
        multiplier, shift, scale = self.multiplier[:K].double(), self.shift[:K].double(), self.scale.double()
        codes = self.codes[:, :K].double()
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter((codes * scale[:, None] * multiplier).float())
        linear.bias = nn.Parameter((self.bias.double() + scale * (codes @ shift)).float())
        return linear.train(self.training)

    @torch.no_grad()
    def multiply(self, gamma: Tensor) -> None:
        """Return `gamma ⊙ y` [N] from now on: steps and bias take its size, codes its sign."""
        gamma = gamma.detach().to(self.scale).double()
        self.codes.mul_(gamma.sign().to(torch.int8)[:, None])
        size = torch.where(gamma == 0, 1.0, gamma.abs())  # steps stay above 0
        self.scale.copy_(self.scale * size)
        self.bias.copy_(self.bias * gamma)

    def check(self, name: str) -> None:
        """Raise `InputError` for codes, steps and shapes that no such layer has."""
        N, K, R = self.out_features, self.in_features, 0 if self.wide is None else len(self.wide)
        shapes: dict[str, tuple[int, ...]] = {"codes": (N, K + R), "scale": (N,), "bias": (N,), "wide": (R,)}
        dtypes = {"codes": torch.int8, "wide": torch.int32}
        for part in ("codes", *_FLOATS, *(["wide"] if R else [])):
            found, shape, dtype = getattr(self, part), shapes.get(part, (K + R,)), dtypes.get(part, torch.float32)
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
        if self.wide is not None:
            self._check_wide(name, self.wide, K)

    def _check_wide(self, name: str, wide: Tensor, K: int) -> None:
        """Raise `InputError` unless the last columns go on where others of the same channels end."""
        ends = torch.tensor([0, K - 1], device=wide.device)
        if bool((torch.cat([ends[:1], wide, ends[1:]]).diff() < 0).any()):
            raise InputError(f"{name}: wide is no rising list of channels from 0 to {K - 1}")
        if not torch.equal(self.shift[K:], further(self.shift[:K], wide)):
            raise InputError(f"{name}: shift of its wide channels does not go on where 255 steps end")
        for part in ("codes", "multiplier"):
            held = getattr(self, part)
            if not torch.equal(held[..., K:], held[..., wide]):
                raise InputError(f"{name}: {part} of its wide channels differ from column to column")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Copied, numbers of another dtype would be read as other numbers, without a word.
        for part in ("codes", *_FLOATS, "wide"):
            given, own = state_dict.get(prefix + part), getattr(self, part)
            if isinstance(given, Tensor) and own is not None and given.dtype != own.dtype:
                raise InputError(f"{prefix}{part} is {given.dtype}, expected {own.dtype}")
        wide = state_dict.get(f"{prefix}wide")  # how many columns there are is the state's
        given, own = (0 if t is None else len(t) for t in (wide, self.wide))
        if given != own:
            fresh = Int8Linear(self.in_features, self.out_features, self.codes.device, wide=given)
            self._buffers.update(fresh._buffers)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def further(shift: Tensor, wide: Tensor) -> Tensor:
    """The shifts [R] of columns that each go on 255 steps after the one of its channel before, from `shift` [K] on."""
    first = torch.searchsorted(wide, wide)  # where the columns of a channel begin
    taken = torch.arange(1, len(wide) + 1, device=wide.device) - first
    return shift[wide] - op.LARGEST * taken
