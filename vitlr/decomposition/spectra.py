"""What decomposition found: for every layer the loss of every rank, and the factors of every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitlr.decomposition.options import Decomposition
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear
from vitlr.ops.linalg.factors import balance


@dataclass(eq=False)
class LayerSpectrum:
    """All ranks of one layer at once, as nested oblique projectors `Π_r = P_r Q_r`, `P [m, n]`, `Q [n, m]`, `Q P = I`.

    `W_r = Π_r W` on the "output" side (m = N), `W_r = W Π_r` on the "input" side (m = K);
    `energies [n]` descend, and dropping all ranks from r on costs `Σ_{i ≥ r} energies[i]` of the objective.
    `mean [K]` is the inputs' mean where the spectrum is centred: the bias then becomes `b + (W - W_r) mean`.
    """

    name: str
    in_features: int
    out_features: int
    side: str
    energies: Tensor
    P: Tensor
    Q: Tensor
    mean: Tensor | None = None

    @property
    def max_rank(self) -> int:
        """The largest rank that has factors: min(N, K)."""
        return self.energies.numel()

    def errors(self) -> Tensor:
        """Loss of keeping r ranks, for r = 0 … n: `error[r] = Σ_{i ≥ r} energies[i]`, shape [n + 1], float64."""
        return tails(self.energies)

    def factors(self, weight: Tensor, rank: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The balanced factors `A [N, r]`, `B [r, K]` of `W_r` and the bias that goes with them, in float64.

        Balanced means that A and B have the same singular values, which keeps half precision and training calm.
        Raises `InputError` for a rank outside 1 … min(N, K).
        """
        if not 1 <= rank <= self.max_rank:
            raise InputError(f"layer {self.name}: rank {rank}, expected 1 to {self.max_rank}")
        W = weight.detach().to(self.P.device, torch.float64)
        if self.side == "output":
            A, B = self.P[:, :rank], self.Q[:rank] @ W
        else:
            A, B = W @ self.P[:, :rank], self.Q[:rank]
        if self.mean is not None:
            shift = W @ self.mean - A @ (B @ self.mean)
            bias = shift if bias is None else bias.detach().to(shift) + shift
        return *balance(A, B), bias


def tails(energies: Tensor) -> Tensor:
    """What dropping all from r on costs, for r = 0 … n, `[n + 1]`."""
    tail = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


class Narrowing(Protocol):
    """What can get narrower: an MLP by hidden neurons, an attention by value channels, heads, or query-key directions.

    All widths at once, as a `LayerSpectrum` holds all ranks: `errors[w]` is what keeping w of `full_width` costs.
    """

    @property
    def name(self) -> str:
        """Of the MLP or attention in the model."""

    @property
    def kind(self) -> str:
        """What goes: "mlp", "channels", "heads" or "query_keys"."""

    @property
    def first(self) -> tuple[str, ...]:
        """The linears that make what gets narrower."""

    @property
    def second(self) -> str:
        """The linear after them, which the layers' order puts last."""

    @property
    def full_width(self) -> int:
        """How many there are."""

    @property
    def group(self) -> int:
        """So many neighbours go together."""

    @property
    def factored(self) -> bool:
        """Whether a narrower width may have ranks as well."""

    @property
    def trims_last(self) -> bool:
        """Whether its last linear loses outputs too."""

    @property
    def errors(self) -> Tensor:
        """Loss of keeping w, for w = 0 … full width."""

    @property
    def solution(self) -> tuple[Any, ...]:
        """What it would take long to find again, and is small."""

    def fits(self, options: Decomposition, step: int) -> bool:
        """Whether solving with these options would give the same, with the ranks at multiples of a step or, 0, none."""

    def choices(self, step: int) -> list[int]:
        """The widths that are offered, the full one last."""

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases, against the full one."""

    def rank_errors(self, name: str, width: int) -> Tensor | None:
        """Loss of every rank of one of its linears at a width; None where it is that of the dense one."""


class Levels(Protocol):
    """What a linear's weight can be rounded to: every level, from fine to coarse, and the layer that it gives."""

    @property
    def name(self) -> str:
        """Of the linear."""

    @property
    def narrowing(self) -> Narrowing | None:
        """Of the MLP at whose widths levels are known as well."""

    @property
    def spectrum(self) -> LayerSpectrum | None:
        """Of its ranks, where the levels of factors are known as well."""

    def ladder(self, width: int | None = None, rank: int | None = None) -> dict[int, tuple[float, float]]:
        """Bytes of the file and predicted loss of every level where its MLP has this width, or it this rank."""

    def rounded(self, level: int, linear: nn.Linear | LowRankLinear, width: int | None) -> nn.Module:
        """The layer of integers at a level, of a linear or its factors as they are where its MLP has this width."""


@dataclass(eq=False)
class Spectra:
    """The spectra of all layers under one objective, how they were made, and of which weights they speak.

    `widths` are those of what may get narrower, MLPs and attentions, `levels` are what the linears' weights may be
    rounded to, where a plan asked for it.
    """

    layers: dict[str, LayerSpectrum]
    objective: str
    fingerprint: str
    centred: bool = False
    damping: float = 0.0
    widths: dict[str, Narrowing] = field(default_factory=dict)
    levels: dict[str, Levels] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Spectra of {len(self.layers)} layers, objective {self.objective}, weights {self.fingerprint}"]
        lines.append(f"{'layer':<40} {'W':>12} {'total':>11} {'rank for 90 %':>13} {'99 %':>6}")
        for layer in self.layers.values():
            total = float(layer.energies.sum())
            errors = layer.errors()
            r90, r99 = (int((errors > (1 - share) * total).sum()) for share in (0.90, 0.99))
            shape = f"{layer.out_features}x{layer.in_features}"
            lines.append(f"{layer.name:<40} {shape:>12} {total:>11.4g} {r90:>13} {r99:>6}")
        return "\n".join(lines)
