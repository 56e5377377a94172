"""The table of what calibration sums, and the sums of one layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import DAMPING
from vitlr.ops.linalg.residuals import Metric
from vitlr.ops.linalg.triangles import length, square, triangle
from vitlr.runtime.mapped import Mapped, put_away


@dataclass(frozen=True)
class Sum:
    """A row of the table: the shape in letters of the layer, what must all be asked for or true, and what it is.

    `extreme` says of which two runs together hold the least or the largest; of all others they hold the sum.
    """

    shape: str
    when: str
    meaning: str
    squares: bool = False  # none of it is negative; moments are told from their shapes
    extreme: Literal["", "least", "largest"] = ""

    @property
    def symmetric(self) -> bool:
        """Whether it is one symmetric matrix, of which the upper triangle says all."""
        return len(self.shape.split()) == 2

    @property
    def start(self) -> float:
        """What no image at all gives."""
        return {"least": math.inf, "largest": -math.inf}.get(self.extreme, 0.0)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """What two runs give together."""
        return {"least": torch.minimum, "largest": torch.maximum}.get(self.extreme, torch.add)(one, other)

    def asked(self, words: Collection[str]) -> bool:
        """Whether a layer of which the words say what is asked for and true collects it."""
        return set(self.when.split()) <= set(words)


# Shapes: n = min(N, K), the rest as the layer has them. Words: objectives ("fisher" brings "loss" along), extras, the
# layer's side, "owner" of its input's moment, "queries" where its first rows make those of an attention.
# P = Σ_tokens y gᵀ (or x (Wᵀg)ᵀ) is one image's gradient seen from the smaller side, wide ones through a random sketch.
SUMS: dict[str, Sum] = {
    "moment": Sum("n n", "owner", "Σ y yᵀ (before the bias) on the output side, Σ x xᵀ on the input side"),
    "gradient": Sum("n n", "loss", "Σ g gᵀ or Σ (Wᵀg)(Wᵀg)ᵀ, g the gradient of the loss at the output"),
    "normalized": Sum("n n", "normalized", "moment with image i weighted by 1 / ‖W x_i‖²_F (arXiv 2402.06004)"),
    "output_gradient": Sum("N N", "loss rounding input", "Σ g gᵀ, where `gradient` is the one at the inputs"),
    "image_moment": Sum("n n", "fisher", "Σ_images P Pᵀ"),
    "image_gradient": Sum("n n", "fisher", "Σ_images Pᵀ P"),
    "input_sum": Sum("K", "", "Σ x"),
    "input_moment": Sum(
        "K K", "input_moment", "Σ x xᵀ on any side; of hidden neurons and of heads side by side, Σ h hᵀ"
    ),
    "input_abs": Sum("K", "input_abs", "Σ |x|", squares=True),
    "input_low": Sum("K", "ranges", "the least x", extreme="least"),
    "input_high": Sum("K", "ranges", "the largest x", extreme="largest"),
    "input_square": Sum("K", "ranges output", "Σ x², where `moment` is not that of the inputs", squares=True),
    "output_square": Sum(
        "N", "ranges loss input", "Σ g² of every output, where `gradient` is not theirs", squares=True
    ),
    "row_gradient": Sum("N", "row_gradient", "Σ_images Σ_k (∂L/∂W)²", squares=True),
    "image_input_moment": Sum("K K", "fisher hidden output", "Σ_images P Pᵀ for P = Σ_tokens h gᵀ"),
    "image_input_sum": Sum("K", "fisher hidden output", "Σ_images P ḡ, ḡ = Σ_tokens g: moves P to another mean of h"),
    "image_output_gradient": Sum("1", "fisher hidden output", "Σ_images ‖ḡ‖²", squares=True),
    "score_moment": Sum("heads d d", "loss queries", "Σ q qᵀ by head"),
    "score_gradient": Sum("heads d d", "loss queries", "Σ g gᵀ by head, g the gradient by q"),
    "image_score_moment": Sum("heads d d", "fisher queries", "Σ_images P Pᵀ by head for P = Σ_tokens q gᵀ"),
    "image_score_gradient": Sum("heads d d", "fisher queries", "Σ_images Pᵀ P by head"),
}
BY_IMAGE_HIDDEN = tuple(key for key, row in SUMS.items() if row.when == "fisher hidden output")
SCORES = tuple(key for key, row in SUMS.items() if "queries" in row.when)


class LayerStatistics:
    """Sums for one layer `y = W x + b`, `W [N, K]`, on its smaller side `n = min(N, K)`, in float64.

    `SUMS` says which there are and of what shape; each is an attribute, None where it was not collected. Symmetric ones
    lie in `held` as their upper triangles, or whole once the attribute was read. Layers fed by one tensor share one
    `moment`, kept by `owner`. With the extra "hidden", the second linears of MLPs have an
    `input_moment`; with "values" the projections of attentions have one.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, owner: str, tokens: int = 0, **sums: Tensor | None
    ) -> None:
        if unknown := set(sums) - set(SUMS):
            raise TypeError(f"a layer has no sum {min(unknown)!r}")
        self.held: dict[str, Tensor] = {key: tensor for key, tensor in sums.items() if tensor is not None}
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.owner, self.tokens = owner, tokens
        self.source: LayerStatistics | None = None  # the owner, where that is another layer

    def __getattr__(self, key: str) -> Tensor | None:
        if key not in SUMS:
            raise AttributeError(f"{type(self).__name__} has no {key!r}")
        if key in self.held:  # from then on whole, so that what is written into it stays
            shared = self.source if key == "moment" else None
            self.held[key] = self.sum(key) if shared is None else shared.whole(key)
        return self.held.get(key)

    def __setattr__(self, key: str, value: Any) -> None:
        if key not in SUMS:
            super().__setattr__(key, value)
            return
        if key == "moment":
            self.source = None
        if value is None:
            self.held.pop(key, None)
        else:
            self.held[key] = value

    @property
    def side(self) -> str:
        """The side the moments live on: "output" where N ≤ K, else "input"."""
        return "output" if self.out_features <= self.in_features else "input"

    @property
    def size(self) -> int:
        """n = min(N, K), the order of the layer's symmetric problem."""
        return min(self.in_features, self.out_features)

    def sum(self, key: str) -> Tensor:
        """One of the sums by name; raises `InputError` where calibration did not collect it."""
        tensor = self.held.get(key)
        if tensor is None:
            raise InputError(
                f"layer {self.name}: these statistics hold no {key}; calibrate with it (objective=, extras=, hidden=)"
            )
        return square(tensor) if SUMS[key].symmetric and tensor.ndim == 1 else tensor

    def whole(self, key: str) -> Tensor:
        """One of the sums, kept whole from now on."""
        self.held[key] = self.sum(key)
        return self.held[key]

    def packed(self, key: str) -> Tensor:
        """One of the sums, a symmetric one as its upper triangle."""
        tensor = self.held[key]
        return triangle(tensor) if SUMS[key].symmetric and tensor.shape == self.shape(key) else tensor

    def begin(self, key: str, shape: tuple[int, ...], device: torch.device, file: Mapped | None = None) -> None:
        """Let there be a sum on a device, a triangle in `file`: what is there already, or that of no image."""
        half = SUMS[key].symmetric and triangles(device)
        if key in self.held:
            self.held[key] = (self.packed(key) if half else self.sum(key)).to(device)
            if half and file is not None:
                self.held[key] = file.zeros(len(self.held[key])).copy_(self.held[key])
                put_away(self.held[key])
        else:
            shape = (length(shape[0]),) if half else shape
            if half and file is not None:
                self.held[key] = file.zeros(*shape)
            else:
                self.held[key] = torch.full(shape, SUMS[key].start, dtype=torch.float64, device=device)

    def keys(self, collect: Collection[str], queries: bool) -> frozenset[str]:
        """The sums that this layer collects; `queries` says that its first rows make those of an attention."""
        words = {*collect, self.side}
        for word, holds in (("loss", "fisher" in words), ("owner", self.owner == self.name), ("queries", queries)):
            if holds:
                words.add(word)
        return frozenset(key for key, row in SUMS.items() if row.asked(words))

    def shape(self, key: str, heads: int = 0, d: int = 0) -> tuple[int, ...]:
        """The shape that the layer's sizes, and the heads of its queries, give a sum."""
        sizes = {"n": self.size, "K": self.in_features, "N": self.out_features, "1": 1, "heads": heads, "d": d}
        return tuple(sizes[letter] for letter in SUMS[key].shape.split())

    def check_shapes(self) -> None:
        """Raise `InputError` where a sum has another shape than the layer's sizes give it."""
        for key, tensor in self.own():
            found, N = tuple(tensor.shape), self.out_features
            if SUMS[key].symmetric and found == (length(self.shape(key)[0]),):
                continue
            heads, d = (found[0], found[-1]) if found else (0, 0)
            of_heads = key in SCORES
            if found != self.shape(key, heads, d) or (of_heads and heads * d not in (N, N // 3)):
                expected = "[heads, d, d] of its rows" if of_heads else str(list(self.shape(key)))
                raise InputError(f"layer {self.name}: {key} is {list(found)}, expected {expected}")

    def check_values(self) -> None:
        """Raise `InputError` for numbers that are no sums of squares, of products, or of what is finite."""
        for key, tensor in self.sums():
            if tensor.dtype != torch.float64:
                raise InputError(f"layer {self.name}: {key} is {tensor.dtype}, expected torch.float64")
            fine = _is_moment(tensor) if tensor.ndim > 1 else bool(torch.isfinite(tensor).all())
            if not fine or (SUMS[key].squares and bool((tensor < 0).any())):
                expected = "a sum of outer products" if tensor.ndim > 1 else "finite numbers"
                raise InputError(f"layer {self.name}: {key} is no {expected}, as calibration measures them")

    def sums(self) -> Iterator[tuple[str, Tensor]]:
        """The sums that this layer keeps itself, in the table's order; a moment that another owns is left out."""
        return ((key, self.sum(key)) for key, _ in self.own())

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """The same as they lie in `held`."""
        for key in SUMS:
            if key in self.held and not (key == "moment" and self.owner != self.name):
                yield key, self.held[key]

    def metric(self, W: Tensor) -> Metric:
        """What these statistics say about errors of the layer; its weight W [N, K] in float64.

        C comes from the moments of an "input" layer or from the extra `input_moment`, else it is estimated from G; S
        from the gradient moments of an "output" layer. Raises NumericalError for NaN or Inf.
        """
        for name, tensor in self.own():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"layer {self.name}: its {name} holds NaN or Inf; calibrate again in float32")
        of_inputs = "moment" if self.side == "input" else "input_moment"
        C = self.sum(of_inputs) if of_inputs in self.held else None
        S = self.sum("gradient") if self.side == "output" and "gradient" in self.held else None
        if C is None:
            C = _inputs_from_outputs(self.sum("moment").to(W), W)
        values, U = torch.linalg.eigh(((C + C.mT) / 2).to(W))
        C = (U * values.clamp_min(0)) @ U.mT
        if S is not None:
            S = S.to(W)
            S = (
                S + DAMPING * S.trace() / len(S) * torch.eye(len(S), dtype=W.dtype, device=W.device)
                if S.any()
                else None
            )
        return Metric(C, U * values.clamp_min(0).sqrt(), S) if C.any() else Metric(S=S)


def triangles(device: torch.device) -> bool:
    """Whether symmetric sums lie there as triangles: on the CPU, whose kernel adds to them; elsewhere as squares."""
    return device.type == "cpu"


def share_moments(layers: Mapping[str, LayerStatistics]) -> None:
    """Give every layer the moment that its owner keeps."""
    for layer in layers.values():
        if layer.owner != layer.name:
            layer.moment, layer.source = layers[layer.owner].held.get("moment"), layers[layer.owner]


_LOOSE = 1e-4  # of the largest entry: what products in float32 may leave
_ROWS = 256  # looked at together


def _is_moment(S: Tensor) -> bool:
    """Whether S [..., n, n] can be a sum of outer products: symmetric, with `S_ij² ≤ S_ii S_jj`, up to rounding."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    if not bool(torch.isfinite(diagonal).all()) or bool((diagonal < 0).any()):
        return False
    root, slack = diagonal.sqrt(), _LOOSE * diagonal.amax(-1)[..., None, None]
    for start in range(0, S.shape[-1], _ROWS):
        rows = slice(start, start + _ROWS)
        part = S[..., rows, :]
        bounded = part.abs() <= root[..., rows, None] * root[..., None, :] + slack  # NaN compares false
        if not bool(bounded.all()) or not bool(((part - S[..., :, rows].mT).abs() <= slack).all()):
            return False
    return True


_SEEN = 1e-3  # of the largest singular value of W: below, G holds more rounding than signal


def _inputs_from_outputs(G: Tensor, W: Tensor) -> Tensor:
    """The C with `W C Wᵀ = G` that is isotropic where W does not look: `W⁺ G W⁺ᵀ + c (1 - W⁺ W)`, c its mean there.

    For a square W it is C itself; for N < K it is what the outputs know of C.
    """
    inverse = torch.linalg.pinv(W, rtol=_SEEN)
    C = inverse @ G @ inverse.mT
    one = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    return C + C.trace() / min(W.shape) * (one - inverse @ W)
