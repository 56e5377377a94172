"""The steps in which a linear's inputs become bytes: those that lose least, and what they lose.

Every channel of an input has a step of its own, 1/255 of its range: what a fold into the norm before, or into the
layer before, would do for some layers is done for all of them where the input becomes bytes. A wider step costs the
input more and the weight less, since the weight's columns are multiplied by it before their rows are rounded.

ViTs have single neurons whose range is hundreds of times that of others: 255 steps are too wide for them, and their
column takes the codes of all others. Those get several columns of 255 steps each, one going on where another ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import LayerStatistics
from vitlr.nn import Int8Linear
from vitlr.ops.layers.int8_chain import LARGEST
from vitlr.runtime.progress import Progress

_MOST = 64  # columns that wide channels of a layer get: what AMX multiplies at once
_WORTH = 10  # a share of all products has to take off ten times that share of the loss
_TINY = 1e-30  # where all is zero


@torch.no_grad()
def byte_inputs(
    linears: Mapping[str, nn.Module],
    stats: Mapping[str, LayerStatistics],
    progress: Progress | None = None,
    spreading: bool = True,
) -> dict[str, Inputs]:
    """The inputs of all layers that were measured, in steps and columns that suit all of them together.

    Without `spreading` no channel has further columns.
    """
    layers = {}
    for name, layer in stats.items():
        linear = linears[name]
        assert isinstance(linear, nn.Linear)
        layers[name] = Inputs.of(linear, layer)
        _ = layers[name].cost  # the longest of it, and kept
        if progress is not None:
            progress(len(layers), len(stats))
    for name, columns in spread(layers).items() if spreading else ():
        layers[name].columns = columns
    return layers


def spread(layers: Mapping[str, Inputs]) -> dict[str, int]:
    """How many further columns each layer's wide channels get: where `log(loss) + 10 log(products)` is least.

    Both are those of all layers together, so one that hardly counts gets none.
    """
    products = sum(inputs.linear.weight.numel() for inputs in layers.values())
    columns = dict.fromkeys(layers, 0)
    total = torch.inf
    while (now := sum(inputs.choice(columns[name]).cost for name, inputs in layers.items())) < total:
        total = now  # the less all cost, the more what is left of one counts
        price = _WORTH * total / products
        for name, inputs in layers.items():
            columns[name] = inputs.cheapest(price * inputs.linear.out_features, columns[name])
    return columns


class Choice(NamedTuple):
    """Steps s [K] of inputs, the columns that each channel has, and what all that costs a token."""

    s: Tensor
    times: Tensor
    cost: float


class Inputs:
    """What is known of the inputs of a linear W [N, K], and the steps that lose least with so many columns.

    `low`, `high`, `mean` [K] are of the inputs. V [K]: their variances; H [K]: what a unit of noise on an input costs,
    diag(Wᵀ S W); S [N]: on an output.
    """

    def __init__(
        self, linear: nn.Linear, low: Tensor, high: Tensor, mean: Tensor, costs: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self.linear, self.low, self.high, self.mean = linear, low, high, mean
        self.V, self.H, self.S = costs
        self.ratio = (self.V / self.H).pow(0.25)
        width = high - low
        self.least = width.clamp_min(1e-6 * width.mean()).clamp_min(_TINY) / LARGEST  # a channel may never have changed
        self.columns = 0  # that its wide channels get
        self._choices: dict[int, Choice] = {}

    @classmethod
    def of(cls, linear: nn.Linear, stats: LayerStatistics) -> Inputs:
        """As calibration saw them."""
        device = linear.weight.device
        low, high = (stats.sum(key).to(device) for key in ("input_low", "input_high"))
        mean = stats.sum("input_sum").to(device) / max(stats.tokens, 1)
        costs = _costs(linear.weight.detach().double(), mean, stats)
        return cls(linear, *_foreseen(low, high, mean, costs[0]), mean, costs)

    @property
    def W(self) -> Tensor:
        """In fp64, which all layers at once would not fit in."""
        return self.linear.weight.detach().double()

    @property
    def cost(self) -> float:
        """What the layer of bytes loses a token."""
        return self.choice(self.columns).cost

    def choice(self, columns: int) -> Choice:
        """The steps with at most so many further columns."""
        if columns not in self._choices:
            times = self._times(columns)
            s, cost = steps(self.W, self.least / times, self.V, self.H, self.S)
            self._choices[columns] = Choice(s, times, cost)
        return self._choices[columns]

    def cheapest(self, price: float, least: int) -> int:
        """How many further columns, `least` or twice as many and so on, cost least at that price of one."""
        best = least
        cost = self.choice(least).cost
        if cost > price and cost - self.choice(_MOST).cost > price:  # than which no number could save more
            for columns in (1, 2, 4, 8, 16, 32, _MOST):
                if columns > least and self._total(columns, price) < self._total(best, price):
                    best = columns
        return best

    def _total(self, columns: int, price: float) -> float:
        choice = self.choice(columns)
        return choice.cost + price * int((choice.times - 1).sum())

    def _times(self, columns: int) -> Tensor:
        """The columns [K] of every channel, so many more in all at most, that make the widest least wide."""
        u = self.least / self.ratio
        low, high = float(u.max()) / (columns + 2), float(u.max())
        for _ in range(40):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if int(_over(u, middle).sum()) <= columns else (middle, high)
        return 1 + _over(u, high)

    @torch.no_grad()
    def layer(self, kind: type[Int8Linear] = Int8Linear) -> Int8Linear:
        """The layer of bytes."""
        s, times, _ = self.choice(self.columns)
        middle, half = (self.low + self.high) / 2, s * times * LARGEST / 2
        return kind.from_weight(self.W, self.linear.bias, middle - half, middle + half, self.mean, times)


def _foreseen(low: Tensor, high: Tensor, mean: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges that other images will need: none is narrower than the middle one of its layer.

    Neurons that no image woke here are much like all others, and so is what other images make of them. None goes below
    what the layer ever saw, nor beyond as many deviations as any of its channels had.
    """
    width, deviation = high - low, V.sqrt()
    tail = (width / deviation).max() * deviation
    grow = (torch.minimum(width.median(), tail) - width).clamp_min(0)
    below = grow * ((mean - low) / width.clamp_min(_TINY)).clamp(0, 1)
    least = torch.maximum(low - below, low.min())
    return least, least + width + grow


def _over(u: Tensor, largest: float) -> Tensor:
    """How many times `largest` is in u, beyond the first time."""
    return (u / largest - 1e-9).ceil().clamp_min(1).long() - 1


def steps(W: Tensor, least: Tensor, V: Tensor, H: Tensor, S: Tensor) -> tuple[Tensor, float]:
    """The steps s [K] of inputs, none below `least`, that lose least: `Σ_j H_j s_j² / 12 + Σ_ij S_i V_j E_ij²`.

    E is the error of W [N, K] where the rows of `W ⊙ s` are rounded to eight bits. Both terms are even at
    `s_j ∝ (V_j / H_j)^¼`; how wide that is is tried out, from all as they are to all alike in this sense.
    """
    ratio = (V / H).pow(0.25)
    best, lost = least, torch.inf
    for share in torch.linspace(0, 1, 11).tolist():
        s = torch.maximum(least, torch.quantile(least / ratio, share) * ratio)
        scale = (W * s).abs().amax(1, keepdim=True) / 127
        E = (W * s / scale.clamp_min(_TINY)).round() * scale / s - W
        loss = float((H * s.square()).sum() / 12 + S @ E.square() @ V)
        if loss < lost:
            best, lost = s, loss
    return best, lost


def _costs(W: Tensor, mean: Tensor, stats: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """V, H and S of a layer; without gradients every output counts alike."""
    tokens, inputs = max(stats.tokens, 1), stats.side == "input"
    V = (stats.sum("moment").diagonal() if inputs else stats.sum("input_square")).to(W) / tokens - mean.square()
    if "gradient" not in stats.held:
        S = W.new_ones(len(W))
        H = S @ W.square()
    elif inputs:
        S, H = stats.sum("output_square").to(W) / tokens, stats.sum("gradient").diagonal().to(W) / tokens
    else:
        G = stats.sum("gradient").to(W) / tokens
        S, H = G.diagonal(), (W * (G @ W)).sum(0)
    V, H = (t.clamp_min(1e-6 * t.mean()).clamp_min(_TINY) for t in (V, H))
    return V, H, S
