"""What every number of query-key directions costs an attention: low rank per head, of the product that the scores are.

A head's scores are `qᵀ k`, the same for `B q` and `B⁻ᵀ k`, and need no more directions than matter. From q, dropping
some is a projector `1 − P_r Q_r` on the head's d channels, and an image's loss moves by `-tr((1 − P_r Q_r) P)` with
`P = Σ_tokens q gᵀ`, g the gradient of the loss by q: the problem of `decomposition.ranks`, with a head for a layer.
`(P_r Q_r q)ᵀ k = (Q_r q)ᵀ (P_rᵀ k)`, so queries and keys lose rows of their linears alike.

Where a token's place turns q and k in planes of two channels, no B but one for each plane leaves the scores as they
are: then whole planes go. `E[P_jj P_kk] = M_jk F_jk` makes the planes D cost `Σ_{p, q in D} C_pq`, C the sums of
`M ∘ F` over pairs of planes, and they go one by one, the one first that then costs least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlr.anatomy.attention import SCORES_SUPPORTED, Attention, nothing, why_no_scores
from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import SCORES, LayerStatistics, Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition, check_objective
from vitlr.errors import InputError, NumericalError
from vitlr.nn.selected_linear import INDEX_BYTES
from vitlr.ops.linalg.eigenproblems import solve

SCALE = 4.0  # what predictions of directions fall short of those of widths and ranks (docs/method.md)


@dataclass(frozen=True, eq=False)
class QueryKeySpectrum:
    """All numbers of directions of one attention at once, of all its heads together: a `Narrowing`.

    `P`, `Q [heads, d, d]` are nested projectors as in `LayerSpectrum`, `energies [heads, d]` what each direction costs,
    descending; `errors[w]` the cost of keeping the w most expensive ones. Of turned queries and keys directions are
    channels, those of one plane side by side, and only even widths are any.
    """

    attention: Attention
    energies: Tensor
    P: Tensor
    Q: Tensor

    kind = "query_keys"
    factored = False  # no ranks beside a narrower width
    trims_last = True
    group = 1

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

    @property
    def solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """What it would take long to find again."""
        return self.energies, self.P, self.Q

    def fits(self, options: Decomposition, step: int) -> bool:
        """Nothing is made up for, so no option changes it."""
        return True

    def choices(self, step: int) -> list[int]:
        """Multiples of the step below the full width, and that."""
        step = math.lcm(step, 2) if self.attention.turned else step
        return [*range(step, self.full_width, step), self.full_width]

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""
        gone = self.full_width - width
        return (full[0] - gone * (2 if len(self.attention.queries_keys) == 1 else 1), full[1])

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases: the numbers of the rows that are left."""
        if width == self.full_width or quantity != "bytes":
            return 0.0
        values = len(self.attention.inputs) < 3  # made by one of these linears: then their rows are numbered as well
        return float(INDEX_BYTES * (2 * width + (self.full_width if values else 0)))

    def rank_errors(self, name: str, width: int) -> Tensor | None:
        """Its linears have ranks only where no direction goes: those of the dense ones."""
        return None

    def ranks(self, width: int) -> list[int]:
        """Directions that every head keeps."""
        if not 1 <= width <= self.full_width:
            raise InputError(f"{self.name}: width {width}, expected 1 to {self.full_width}")
        kept = torch.zeros(self.full_width, dtype=torch.bool)
        kept[self.energies.flatten().argsort(descending=True, stable=True)[:width]] = True
        return kept.view_as(self.energies).sum(1).tolist()

    def places(self, width: int) -> Tensor:
        """The channels of all heads side by side that hold what is kept: the first ones of a head, or of its planes."""
        d, ranks = self.attention.head_dim, self.ranks(width)
        own = [
            q.argmax(1)[:rank].sort().values if self.attention.turned else torch.arange(rank)
            for q, rank in zip(self.Q, ranks, strict=True)
        ]
        return torch.cat([head * d + channels for head, channels in enumerate(own)])


def solve_query_keys(
    attention: Attention, stats: Statistics, objective: Objective, known: tuple[Tensor, Tensor, Tensor] | None = None
) -> QueryKeySpectrum:
    """All numbers of directions of one of `measured_query_keys`. Raises `NumericalError` naming it and the head."""
    if known is not None:
        return QueryKeySpectrum(attention, *known)
    layer = stats.layers[attention.queries_keys[0]]
    heads = [_solved(layer, head, objective, attention) for head in range(attention.heads)]
    energies, P, Q = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return QueryKeySpectrum(attention, SCALE * energies, P, Q)


def measured_query_keys(parts: Parts, stats: Statistics, objective: Objective) -> dict[str, Attention]:
    """The attentions whose scores are plain products and whose queries and keys were measured.

    Raises `InputError` where there are none, and for an objective without gradients.
    """
    check_objective(objective.name, centred=objective.centred, widths=True)
    if not objective.by_gradient:
        raise InputError(
            f"attention='query_keys' needs an objective of gradients, loss or fisher, not {objective.name!r}"
        )
    layers = stats.layers
    found = {name: a for name, a in parts.query_keys.items() if all(linear in layers for linear in a.queries_keys)}
    if not found:
        refused = why_no_scores(parts.model)
        raise InputError(nothing(parts.model, refused, "directions of queries and keys", SCORES_SUPPORTED))
    return found


def has_query_keys(stats: Statistics, objective: Objective) -> bool:
    """Whether these statistics hold what `solve_query_keys` needs."""
    keys = SCORES if objective.by_image else SCORES[:2]
    layers = stats.layers.values()
    return objective.by_gradient and any(all(getattr(layer, key) is not None for key in keys) for layer in layers)


def _solved(
    layer: LayerStatistics, head: int, objective: Objective, attention: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, P and Q of one head."""
    name = attention.name
    keys = SCORES if objective.by_image else SCORES[:2]
    M, F, *by_image = (layer.sum(key)[head].double() for key in keys)
    P_Pt, Pt_P = by_image or (None, None)
    M, F = objective.of_activations(M, P_Pt), objective.of_gradients(F, Pt_P, layer.tokens)
    one = torch.eye(len(M), dtype=torch.float64)
    if not bool(F.any()):  # nothing depends on this head
        Q = one[attention.planes.flatten()] if attention.turned else one
        return torch.zeros(len(M), dtype=torch.float64), Q.mT, Q
    try:
        F = objective.damped(F, one, "output")
        energies, P, Q = _by_planes(M, F, attention.planes) if attention.turned else solve(M, F)
    except (torch.linalg.LinAlgError, NumericalError) as cause:
        raise NumericalError(f"attention {name}, head {head}: the solve failed ({cause}); calibrate again") from cause
    if not all(bool(torch.isfinite(part).all()) for part in (energies, P, Q)):
        raise NumericalError(f"attention {name}, head {head}: its moments hold NaN or Inf; calibrate again in float32")
    return energies, P, Q


def _by_planes(M: Tensor, F: Tensor, planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where only whole planes go, `planes [d/2, 2]`: P and Q put their channels in order of their cost."""
    C = (M * F)[planes[:, None, :, None], planes[None, :, None, :]].sum((2, 3))
    more, left, gone, costs = C.diag().clone(), torch.ones(len(C), dtype=torch.bool), [], []
    for _ in range(len(C)):  # what each plane that is left would add, as far as planes before it went
        plane = int(torch.where(left, more, torch.inf).argmin())
        gone.append(plane)
        costs.append(more[plane].clone())
        left[plane] = False
        more += 2 * C[:, plane]
    energies = torch.stack(costs).clamp(min=0).cummax(0).values.flip(0)
    Q = torch.eye(planes.numel(), dtype=M.dtype)[planes[gone[::-1]].flatten()]
    return (energies / 2).repeat_interleave(2), Q.mT.contiguous(), Q
