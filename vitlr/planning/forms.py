"""The forms of a linear, dense or of low rank, rounded or not: what each costs in the budget's quantity and loses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitlr.decomposition.matrices import Bits
from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.errors import InputError
from vitlr.measuring.cost import Cost
from vitlr.planning.choices import DENSE, Form
from vitlr.planning.knapsack import Array, Prices
from vitlr.planning.options import Planning

_RANKS = 2.0  # what a loss of ranks counts against one of widths or bits: it falls short twice as far (docs/method.md)
_BIAS = 2  # bytes of its entries where all else is rounded


@dataclass(frozen=True)
class Sizes:
    """What allocation must know of the model beside the spectra: its totals, tokens per image, bytes per weight."""

    total: Cost
    tokens: Mapping[str, float]
    itemsize: Mapping[str, int]
    has_bias: Mapping[str, bool]
    rest: int = 0  # bytes that all else takes where weights are rounded
    matrices: Mapping[str, Bits] = field(default_factory=dict)  # of all else, those whose bits may be chosen


@dataclass(frozen=True)
class Forms:
    """What may become of linears, by their `spectra`, under a budget of `quantity`; `wanted` may change."""

    spectra: Spectra
    sizes: Sizes
    quantity: str
    options: Planning
    wanted: Collection[str]

    @property
    def method(self) -> str:
        """What is offered: ranks, widths, bits, or some of them."""
        return self.options.settled or "lowrank"

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded within the budget, and its bytes are those of the file."""
        return self.options.rounds(self.quantity)

    def of(self, narrowing: Narrowing | None, name: str, width: int | None, factored: bool) -> list[Form]:
        """Those that a linear has where its MLP or attention has this width, the one that changes nothing last."""
        if name not in self.wanted:
            return [DENSE]
        ranks = self.ranks(*self.shape(narrowing, name, width)) if factored else []
        if not self.rounds:
            return [*(Form(rank) for rank in ranks), DENSE]
        left = [DENSE] if 16 in self.options.stored or not self.options.stored else []
        pairs = ((rank, self.levels(narrowing, name, width, rank)) for rank in (*ranks, None))
        return [*(Form(rank, level) for rank, levels in pairs for level in levels), *left]

    def levels(self, narrowing: Narrowing | None, name: str, width: int | None, rank: int | None) -> list[int]:
        """Those that it may take: all, or for each of `bits` the finest that stores a weight in no more.

        Raises `InputError` where a layer can take none of them and may not be left.
        """
        ladder, (N, K) = self.ladder(name, width, rank), self.shape(narrowing, name, width)
        if not self.options.stored:
            return [*ladder]
        weights = N * K if rank is None else rank * (N + K)
        stored = {level: 8 * size / weights for level, (size, _) in ladder.items()}
        fitting = ([level for level in ladder if stored[level] <= bits] for bits in self.options.stored)
        taken = [min(levels) for levels in fitting if levels]
        whole = rank is None and (narrowing is None or width in (None, narrowing.full_width))
        if not taken and whole and 16 not in self.options.stored:
            raise InputError(
                f"layer {name}: bits={self.options.bits!r} cannot be reached, its coarsest level stores "
                f"{min(stored.values()):.2f} bits a weight; raise bits=, or leave the layer out with exclude="
            )
        return sorted(set(taken))

    def prices(self, narrowing: Narrowing | None, name: str, width: int | None, forms: Sequence[Form]) -> Prices:
        """What these forms cost and lose, without the loss of the width."""
        shape = self.shape(narrowing, name, width)
        errors = self.errors(narrowing, name, width, forms)
        scale = _RANKS if self.rounds else 1.0
        rounded = {form.rank for form in forms if form.level is not None}
        ladders = {rank: self.ladder(name, width, rank) for rank in rounded}
        cost, loss = np.zeros(len(forms)), np.zeros(len(forms))
        for i, (rank, level, _) in enumerate(forms):
            cost[i], loss[i] = self.cost(narrowing, name, shape, rank), 0.0 if rank is None else scale * errors[rank]
            if level is not None:
                size, lost = ladders[rank][level]
                cost[i] = size + self.fewer_biases(name, shape[0]) if self.rounds else cost[i]
                loss[i] += lost
        return Prices(cost, self.correction(narrowing, name) * loss)

    def correction(self, narrowing: Narrowing | None, name: str) -> float:
        """What a predicted loss counts of a linear, or of the MLP or attention that it is a part of."""
        return (self.options.corrections or {}).get(name if narrowing is None else narrowing.name, 1.0)

    def ladder(self, name: str, width: int | None, rank: int | None) -> dict[int, tuple[float, float]]:
        """Bytes and loss of every level of a linear where its MLP has this width, and it this rank."""
        return self.spectra.levels[name].ladder(width, rank)

    def cost(self, narrowing: Narrowing | None, name: str, shape: tuple[int, int], rank: int | None) -> float:
        """Of a linear's weights at the shape (N, K), and of its bias where that is not what it was."""
        N, K = shape
        weights = N * K if rank is None else rank * (N + K)
        if self.rounds:
            return weights * self.unit(name) + self.fewer_biases(name, N)
        return (weights + self.bias(narrowing, name, N, rank)) * self.unit(name)

    def bias(self, narrowing: Narrowing | None, name: str, N: int, rank: int | None) -> int:
        """Entries of a bias that shrinks with the width, or that a centred rank brings; 0 where it stays as it is."""
        if self.quantity == "macs":
            return 0
        if self.sizes.has_bias[name]:
            return N * (narrowing is not None and (name != narrowing.second or narrowing.trims_last))
        return N * (self.spectra.centred and rank is not None)

    def fewer_biases(self, name: str, N: int) -> int:
        """Bytes of a bias of N entries against the whole one, which counts among all else."""
        return _BIAS * (N - self.spectra.layers[name].out_features) * self.sizes.has_bias[name]

    def bytes_of(self, narrowing: Narrowing | None, name: str, width: int | None, form: Form) -> float:
        """Bytes of the file for a linear's weights where all else is rounded too."""
        N, K = self.shape(narrowing, name, width)
        if form.level is None:
            size = float(self.sizes.itemsize[name] * (N * K if form.rank is None else form.rank * (N + K)))
        else:
            size = self.ladder(name, width, form.rank)[form.level][0]
        return size + self.fewer_biases(name, N)

    def unit(self, name: str) -> float:
        """Cost of one weight of a layer."""
        sizes = self.sizes
        return {"params": 1.0, "macs": sizes.tokens[name], "bytes": float(sizes.itemsize[name])}[self.quantity]

    def shape(self, narrowing: Narrowing | None, name: str, width: int | None) -> tuple[int, int]:
        """(N, K) of a layer where its MLP or attention has this width."""
        spectrum = self.spectra.layers[name]
        full = spectrum.out_features, spectrum.in_features
        return full if narrowing is None or width is None else narrowing.shape(name, full, width)

    def errors(self, narrowing: Narrowing | None, name: str, width: int | None, forms: Sequence[Form]) -> Array:
        """Loss of every rank, where one is asked for. A narrower first linear keeps rows of the dense one's factors."""
        if all(form.rank is None for form in forms):
            return np.zeros(0)
        own = None if narrowing is None or width is None else narrowing.rank_errors(name, width)
        return (self.spectra.layers[name].errors() if own is None else own).cpu().numpy()

    def ranks(self, N: int, K: int) -> list[int]:
        """Multiples of the step, from the least one, at which two factors are smaller than the matrix."""
        step = self.options.rank_step
        first = -(-self.options.min_rank // step) * step
        return [r for r in range(first, min(N, K) + 1, step) if r * (N + K) < N * K]
