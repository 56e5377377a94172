"""What every number of query-key directions costs an attention: low rank per head, of the product that the scores are.

A head's scores are `qᵀ k`, the same for `B q` and `B⁻ᵀ k`, and need no more directions than matter. From q, dropping
some is a projector `1 − P_r Q_r` on the head's d channels, and an image's loss moves by `-tr((1 − P_r Q_r) P)` with
`P = Σ_tokens q gᵀ`, g the gradient of the loss by q: the problem of `decomposition.ranks`, with a head for a layer.
`(P_r Q_r q)ᵀ k = (Q_r q)ᵀ (P_rᵀ k)`, so queries and keys lose rows of their linears alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitlr.anatomy.attention import SCORES_SUPPORTED, Attention, nothing, score_attentions, why_no_scores
from vitlr.calibration.options import GRADIENT_OBJECTIVES
from vitlr.calibration.statistics import SCORES, LayerStatistics, Statistics
from vitlr.decomposition.mlp_widths import RIDGE, check_options
from vitlr.decomposition.objectives import balanced
from vitlr.errors import InputError, NumericalError
from vitlr.nn.selected_linear import INDEX_BYTES
from vitlr.ops.linalg.eigenproblems import solve

SCALE = 4.0  # what predictions of directions fall short of those of widths and ranks (docs/method.md)


@dataclass(eq=False)
class ScoreSpectrum:
    """All numbers of directions of one attention at once, of all its heads together; the interface of `WidthSpectrum`.

    `P`, `Q [heads, d, d]` are nested projectors as in `LayerSpectrum`, `energies [heads, d]` what each direction costs,
    descending; `errors[w]` the cost of keeping the w most expensive ones.
    """

    attention: Attention
    energies: Tensor
    P: Tensor
    Q: Tensor
    compensated: bool
    ridge: float
    kind: str = field(default="scores", init=False)
    factored: bool = field(default=False, init=False)  # no ranks beside a narrower width
    trims_last: bool = field(default=True, init=False)
    group: int = field(default=1, init=False)

    @property
    def name(self) -> str:
        """Of the attention."""
        return self.attention.name

    @property
    def first(self) -> tuple[str, ...]:
        """Of two linears that make queries and keys the first one."""
        return self.attention.queries_keys[:-1]

    @property
    def second(self) -> str:
        """The last one."""
        return self.attention.queries_keys[-1]

    @property
    def full_width(self) -> int:
        """Directions of all heads together."""
        return self.attention.width

    @property
    def errors(self) -> Tensor:
        """Cost of keeping w directions, for w = 0 … full width."""
        ascending = self.energies.flatten().sort().values
        return torch.cat([ascending.new_zeros(1), ascending.cumsum(0)]).flip(0)

    def choices(self, step: int) -> list[int]:
        """Multiples of the step below the full width, and that."""
        return [*range(step, self.full_width, step), self.full_width]

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""
        gone = self.full_width - width
        return (full[0] - gone * (2 if len(self.attention.queries_keys) == 1 else 1), full[1])

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases: the numbers of the rows that are left."""
        if width == self.full_width or quantity != "bytes":
            return 0.0
        packed = len(self.attention.queries_keys) == 1
        return float(INDEX_BYTES * (2 * width + (self.full_width if packed else 0)))

    def ranks(self, width: int) -> list[int]:
        """Directions that every head keeps."""
        if not 1 <= width <= self.full_width:
            raise InputError(f"{self.name}: width {width}, expected 1 to {self.full_width}")
        kept = torch.zeros(self.full_width, dtype=torch.bool)
        kept[self.energies.flatten().argsort(descending=True, stable=True)[:width]] = True
        return kept.view_as(self.energies).sum(1).tolist()


def solve_scores(
    model: nn.Module,
    stats: Statistics,
    objective: str | None = None,
    *,
    compensate: bool = True,
    ridge: float = RIDGE,
    damping: float = 0.1,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, ScoreSpectrum]:
    """The spectra of all attentions whose scores are plain products and were measured, by name, in float64.

    Needs an objective of gradients and the moments of `calibrate(..., hidden=True)`; nothing is to be made up for, so
    `compensate` and `ridge` are only kept. Raises `InputError` where the statistics hold no such moments or no
    attention is known, with what is supported, `NumericalError` naming the attention.
    """
    objective = objective or stats.default_objective
    check_options(objective, RIDGE)
    if objective not in GRADIENT_OBJECTIVES:
        raise InputError(f"attention='scores' needs an objective of gradients, loss or fisher, not {objective!r}")
    found: dict[str, ScoreSpectrum] = {}
    measured = score_attentions(model, stats.layers)
    if not measured:
        raise InputError(nothing(model, why_no_scores(model), "directions of queries and keys", SCORES_SUPPORTED))
    for name, attention in measured.items():
        layer = stats.layers[attention.queries_keys[0]]
        heads = [_solved(layer, head, stats, objective, damping, name) for head in range(attention.heads)]
        energies, P, Q = (torch.stack(parts) for parts in zip(*heads, strict=True))
        found[name] = ScoreSpectrum(attention, SCALE * energies, P, Q, compensate, ridge)
        if progress is not None:
            progress(len(found), len(measured))
    return found


def has_scores(stats: Statistics, objective: str) -> bool:
    """Whether these statistics hold what `solve_scores` needs."""
    keys = {"fisher": SCORES, "loss": SCORES[:2]}.get(objective)
    layers = stats.layers.values()
    return keys is not None and any(all(getattr(layer, key) is not None for key in keys) for layer in layers)


def _solved(
    layer: LayerStatistics, head: int, stats: Statistics, objective: str, damping: float, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, P and Q of one head."""
    M, F = (layer.sum(key)[head].double() for key in ("score_moment", "score_gradient"))
    if objective == "fisher":
        by_image = [layer.sum(key)[head].double() for key in ("image_score_moment", "image_score_gradient")]
        M = balanced(by_image[0], M)
        F = balanced(by_image[1], F) * by_image[1].trace() / (2 * max(stats.images, 1) * stats.samples)
    else:
        M, F = M / max(stats.images, 1), F / (2 * max(layer.tokens, 1) * stats.samples)
    one = torch.eye(len(M), dtype=torch.float64)
    if not bool(F.any()):  # nothing depends on this head
        return torch.zeros(len(M), dtype=torch.float64), one, one
    try:
        energies, P, Q = solve(M, F + damping * F.trace() / len(F) * one)
    except (torch.linalg.LinAlgError, NumericalError) as cause:
        raise NumericalError(f"attention {name}, head {head}: the solve failed ({cause}); calibrate again") from cause
    if not all(bool(torch.isfinite(part).all()) for part in (energies, P, Q)):
        raise NumericalError(f"attention {name}, head {head}: its moments hold NaN or Inf; calibrate again in float32")
    return energies, P, Q
