"""Calls of the ops with random arguments: what the gate checks and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vitlr.ops.dispatch import registry


@dataclass(frozen=True)
class Call:
    """One call of an op: `make(seed)` gives its arguments.

    `meant(*arguments)`: what the op means, in fp64, where its specification in fp64 rounds on the way.
    """

    op: str
    label: str
    make: Callable[[int], tuple]
    meant: Callable[..., Tensor] | None = None

    @property
    def dtype(self) -> str:
        """The dtype by its name, the label's last word."""
        return self.label.rpartition(" ")[2]

    def reference(self) -> Callable[..., Any]:
        """The op's specification in plain torch."""
        return registry.candidates(self.op)[0].run

    def key(self, args: tuple) -> Any:
        """The key that the op hands to dispatch for these arguments."""
        keys: list[Any] = []

        def note(op: str, key: Any) -> registry.Candidate:
            keys.append(key)
            return registry.candidates(op)[0]

        with patch.object(registry, "select", note):
            first = args[0].clone()  # an op that accumulates writes there
            getattr(torch.ops.vitlr, self.op).default(first, *args[1:])
        return keys[0]

    def candidates(self, args: tuple) -> dict[str, Callable[..., Any]]:
        """Everything that can run these arguments, plain torch included."""
        key = self.key(args)
        return {c.name: c.run for c in registry.candidates(self.op) if c.supports(key) is None}


class Random:
    """Seeded random tensors of one dtype on one device, each entry of variance 1 / fan_in."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._dtype, self._device = dtype, device

    def __call__(self, *shape: int, fan_in: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self._generator, device=self._device) / fan_in**0.5
        return x.to(dtype or self._dtype)


def linear(
    M: int, K: int, N: int, r: int, dtype: torch.dtype, device: torch.device, act: str = "none", residual: bool = False
) -> Call:
    """`lowrank_linear` with a bias."""

    def make(seed: int) -> tuple:
        new = Random(seed, dtype, device)
        extra = new(M, N) if residual else None
        return new(M, K), new(r, K, fan_in=K), new(N, r, fan_in=r), new(N), extra, act

    label = f"{K}x{N} r={r} M={M} {act}{' +residual' if residual else ''} {_name(dtype)}"
    return Call("lowrank_linear", label, make)


def mlp(
    M: int,
    K: int,
    D: int,
    N: int,
    r1: int | None,
    r2: int | None,
    dtype: torch.dtype,
    device: torch.device,
    act: str = "gelu",
    residual: bool = False,
) -> Call:
    """`lowrank_mlp` with biases; a rank of None is a dense linear."""

    def make(seed: int) -> tuple:
        new = Random(seed, dtype, device)
        extra = new(M, N) if residual else None
        return new(M, K), *_pair(new, K, D, r1), new(D), *_pair(new, D, N, r2), new(N), extra, act

    label = f"{K}-{D}-{N} r={r1},{r2} M={M} {act}{' +residual' if residual else ''} {_name(dtype)}"
    return Call("lowrank_mlp", label, make)


def glu(
    M: int,
    K: int,
    D: int,
    N: int,
    r: int | None,
    r2: int | None,
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = False,
    act: str = "silu",
    residual: bool = False,
) -> Call:
    """`lowrank_glu` with biases; `packed` shares one B between gate and value, as SwiGLUPacked does."""

    def make(seed: int) -> tuple:
        new = Random(seed, dtype, device)
        x, extra = new(M, K), new(M, N) if residual else None
        gate = _pair(new, K, D, r)
        value = (gate[0], new(D, r, fan_in=r)) if packed and r is not None else _pair(new, K, D, r)
        return x, *gate, new(D), *value, new(D), *_pair(new, D, N, r2), new(N), extra, act

    label = f"{K}-{D}-{N} r={r},{r2}{' packed' * packed} M={M} {act}{' +residual' * residual} {_name(dtype)}"
    return Call("lowrank_glu", label, make)


def _pair(new: Random, K: int, N: int, r: int | None) -> tuple[Tensor, Tensor | None]:
    return (new(N, K, fan_in=K), None) if r is None else (new(r, K, fan_in=K), new(N, r, fan_in=r))


def residual_linear(
    M: int, K: int, N: int, r: int, form: str, group: int, dtype: torch.dtype, device: torch.device
) -> Call:
    """`lowrank_residual_linear` with a bias; the residual is a random matrix, quantised."""
    from vitlr.ops.layers.codes import LARGEST, encode, spread

    def make(seed: int) -> tuple:
        new = Random(seed, dtype, device)
        if form == "blockdiag":
            R, scale = new(K // group, N * group // K, group, fan_in=group), None
        else:
            W = new(N, K, fan_in=K, dtype=torch.float32)
            scale = (W.unflatten(-1, (-1, group)).abs().amax(-1) / LARGEST[form]).to(dtype)
            R = encode(W / spread(scale.float(), group, K), form)
        return new(M, K), new(r, K, fan_in=K), new(N, r, fan_in=r), R, scale, new(N), form, group

    return Call("lowrank_residual_linear", f"{K}x{N} r={r} {form}/{group} M={M} {_name(dtype)}", make)


def chain(b: int, m: int, k: int, dtype: torch.dtype, device: torch.device) -> Call:
    """`weighted_gram_chain` of b problems."""

    def make(seed: int) -> tuple:
        new = Random(seed, dtype, device)
        X = new(b, k, k, fan_in=k)
        return new(b, m, k, fan_in=k), X @ X.mT

    return Call("weighted_gram_chain", f"{b} x {m}x{k} {_name(dtype)}", make)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
