"""What calibration measured: sums over the images of what every linear layer sees and sends back."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitlr.calibration.options import DEFAULT
from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import DAMPING
from vitlr.ops.linalg.residuals import Metric
from vitlr.runtime import storage
from vitlr.runtime.storage import fingerprint

SCHEMA = 1
_EXTRA_SUMS = ("input_moment", "input_abs", "row_gradient")
_LONG = ("input_sum", "input_abs", "image_input_sum")
BY_IMAGE_HIDDEN = ("image_input_moment", "image_input_sum", "image_output_gradient")  # of "fisher" with these two
SCORES = ("score_moment", "score_gradient", "image_score_moment", "image_score_gradient")
_SUMS = (
    "moment",
    "gradient",
    "normalized",
    "image_moment",
    "image_gradient",
    "input_sum",
    *_EXTRA_SUMS,
    *BY_IMAGE_HIDDEN,
    *SCORES,
)


@dataclass(eq=False)  # tensors have no single truth
class LayerStatistics:
    """Sums for one layer `y = W x + b`, `W [N, K]`, on its smaller side `n = min(N, K)`, in float64.

    `moment [n, n]` is `Σ y yᵀ` (before the bias) where N ≤ K ("output" side), else `Σ x xᵀ` ("input" side);
    `gradient [n, n]` is `Σ g gᵀ` or `Σ (Wᵀg)(Wᵀg)ᵀ` with `g` the gradient of the loss at the output;
    `normalized [n, n]` is `moment` with image i weighted by `1 / ‖W x_i‖²_F` (arXiv 2402.06004);
    `image_moment [n, n]` is `Σ_images P Pᵀ` and `image_gradient [n, n]` is `Σ_images Pᵀ P` for `P = Σ_tokens y gᵀ`
    (or `x (Wᵀg)ᵀ`), one image's gradient seen from the layer's smaller side, wide ones through a random sketch;
    `input_sum [K]` is `Σ x`. Extras: `input_moment [K, K] = Σ x xᵀ` on any side, `input_abs [K] = Σ |x|`,
    `row_gradient [N] = Σ_images Σ_k (∂L/∂W)²`. With the extra "hidden", the second linears of MLPs have their
    `input_moment`, which is that of the hidden neurons, `Σ h hᵀ [D, D]`; with "values" the projections of attentions
    have it, that of the heads side by side. With "fisher" too they have
    `image_input_moment [D, D] = Σ_images P Pᵀ` for `P = Σ_tokens h gᵀ`, and what moves it to another mean of h:
    `image_input_sum [D] = Σ P ḡ` and `image_output_gradient [1] = Σ ‖ḡ‖²`, `ḡ = Σ_tokens g`. Layers fed by one tensor
    share one `moment`, kept by `owner`. With "hidden" and an objective of gradients, linears that make queries have
    `score_moment [heads, d, d]` `Σ q qᵀ` and `score_gradient` `Σ g gᵀ`, g the gradient by q, and with "fisher"
    `image_score_moment` `Σ_images P Pᵀ` and `image_score_gradient` `Σ_images Pᵀ P` for `P = Σ_tokens q gᵀ`, by head.
    """

    name: str
    in_features: int
    out_features: int
    owner: str
    tokens: int = 0
    moment: Tensor | None = None
    gradient: Tensor | None = None
    normalized: Tensor | None = None
    image_moment: Tensor | None = None
    image_gradient: Tensor | None = None
    input_sum: Tensor | None = None
    input_moment: Tensor | None = None
    input_abs: Tensor | None = None
    row_gradient: Tensor | None = None
    image_input_moment: Tensor | None = None
    image_input_sum: Tensor | None = None
    image_output_gradient: Tensor | None = None
    score_moment: Tensor | None = None
    score_gradient: Tensor | None = None
    image_score_moment: Tensor | None = None
    image_score_gradient: Tensor | None = None

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
        tensor = getattr(self, key)
        if tensor is None:
            raise InputError(
                f"layer {self.name}: these statistics hold no {key}; calibrate with it (objective=, extras=, hidden=)"
            )
        return tensor

    def check_shapes(self) -> None:
        """Raise `InputError` where a sum has another shape than the layer's sizes give it."""
        n, K, N = self.size, self.in_features, self.out_features
        square = dict.fromkeys(("moment", "gradient", "normalized", "image_moment", "image_gradient"), (n, n))
        wide, long = dict.fromkeys(("input_moment", "image_input_moment"), (K, K)), dict.fromkeys(_LONG, (K,))
        expected = {**square, **wide, **long, "row_gradient": (N,), "image_output_gradient": (1,)}
        for key, tensor in self.sums():
            if key in SCORES:
                self._check_heads(key, tensor)
            elif tensor.shape != expected[key]:
                raise InputError(f"layer {self.name}: {key} is {list(tensor.shape)}, expected {list(expected[key])}")

    def _check_heads(self, key: str, tensor: Tensor) -> None:
        heads, d = tensor.shape[0] if tensor.ndim else 0, tensor.shape[-1] if tensor.ndim else 0
        if tensor.ndim != 3 or tensor.shape[1] != d or heads * d not in (N := self.out_features, N // 3):
            raise InputError(f"layer {self.name}: {key} is {list(tensor.shape)}, expected [heads, d, d] of its rows")

    def sums(self) -> Iterator[tuple[str, Tensor]]:
        """The sums that this layer keeps itself, by name; a moment that another layer owns is left out."""
        for key in _SUMS:
            tensor = getattr(self, key)
            if tensor is not None and not (key == "moment" and self.owner != self.name):
                yield key, tensor

    def metric(self, W: Tensor) -> Metric:
        """What these statistics say about errors of the layer; its weight W [N, K] in float64.

        C comes from the moments of an "input" layer or from the extra `input_moment`, else it is estimated from G; S
        from the gradient moments of an "output" layer. Raises NumericalError for NaN or Inf.
        """
        for name, tensor in self.sums():
            if not torch.isfinite(tensor).all():
                raise NumericalError(f"layer {self.name}: its {name} holds NaN or Inf; calibrate again in float32")
        C = self.moment if self.side == "input" else self.input_moment
        S = self.gradient if self.side == "output" else None
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


@dataclass(eq=False)  # tensors have no single truth
class Statistics:
    """The moments of all layers over `images` images; additive, so runs can be merged.

    `objectives` and `extras` say what was collected, `samples` how many targets were drawn per image, `seed` from
    which seed, `macs` what one dense forward costs, `input_shape` the shape of one image, `fingerprint` of which
    weights this speaks. `whole` is false while a batch is being added, and stays so where that failed.
    """

    layers: dict[str, LayerStatistics]
    fingerprint: str
    objectives: tuple[str, ...] = (DEFAULT,)
    extras: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    images: int = 0
    macs: int = 0
    input_shape: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    whole: bool = True

    def __str__(self) -> str:
        tokens = sum(layer.tokens for layer in self.layers.values())
        return (
            f"Statistics of {len(self.layers)} layers over {self.images} images ({tokens} layer tokens), "
            f"objectives {', '.join(self.objectives)}, weights {self.fingerprint}"
        )

    @property
    def default_objective(self) -> str:
        """The objective that `plan` uses when none is named: the first one collected."""
        return self.objectives[0]

    def _kind(self) -> dict[str, Any]:
        """What must agree before two runs may be added up."""
        return {
            "weights": self.fingerprint,
            "objectives": sorted(self.objectives),
            "extras": sorted(self.extras),
            "samples": self.samples,
            "seed": self.seed,
            "layers": sorted(self.layers),
            "image sizes": self.input_shape,
            "macs": self.macs,
        }

    def check_addable(self, other: Statistics) -> None:
        """Raise `InputError` where `other` speaks of other weights, layers, objectives, image sizes or draws."""
        self.check_whole()
        other.check_whole()
        mine, theirs = self._kind(), other._kind()
        for key, value in mine.items():
            if value != theirs[key]:
                raise InputError(
                    f"these statistics do not belong together: {key} differ ({theirs[key]} against {value}); "
                    "calibrate again"
                )

    def merge(self, other: Statistics) -> Statistics:
        """Add up two runs over different images; raises `InputError` where they do not belong together."""
        self.check_addable(other)
        layers: dict[str, LayerStatistics] = {}
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            sums = {key: tensor + getattr(theirs, key) for key, tensor in mine.sums()}
            layers[name] = LayerStatistics(
                name, mine.in_features, mine.out_features, mine.owner, mine.tokens + theirs.tokens, **sums
            )
        _share_moments(layers)
        notes = {**self.notes, **other.notes}
        return replace(self, layers=layers, images=self.images + other.images, notes=notes)

    def check_whole(self) -> None:
        """Raise `InputError` where a batch was added half: an error or an interrupt came in between."""
        if not self.whole:
            raise InputError("these statistics hold half a batch, because their calibration failed; calibrate again")

    def check_fits(self, weights: Mapping[str, Tensor]) -> None:
        """Raise `InputError` unless `weights` (by layer name) are those that were calibrated."""
        self.check_whole()
        missing = [name for name in self.layers if name not in weights]
        if missing:
            raise InputError(
                f"these statistics are of another model: it has no layer {missing[0]!r}; calibrate this model"
            )
        found = fingerprint({name: weights[name] for name in self.layers})
        if found != self.fingerprint:
            raise InputError(
                f"these statistics are of other weights (fingerprint {self.fingerprint}, this model has {found}); "
                "calibrate this model, with the weights and dtype it has now"
            )

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first layer whose sums hold NaN or Inf."""
        for layer in self.layers.values():
            for key, tensor in layer.sums():
                if not math.isfinite(tensor.sum()):  # one pass, where isfinite() takes several over gigabytes
                    raise NumericalError(
                        f"layer {layer.name}: the {key} sums hold NaN or Inf; check the weights and the images, "
                        "or use float32"
                    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        self.check_whole()
        tensors = {f"{name}|{key}": tensor for name, layer in self.layers.items() for key, tensor in layer.sums()}
        header = {
            "fingerprint": self.fingerprint,
            "objectives": self.objectives,
            "extras": self.extras,
            "samples": self.samples,
            "seed": self.seed,
            "images": self.images,
            "macs": self.macs,
            "input_shape": self.input_shape,
            "notes": self.notes,
            "layers": [[s.name, s.in_features, s.out_features, s.owner, s.tokens] for s in self.layers.values()],
        }
        storage.save_tensors(path, tensors, header, kind="statistics", schema=SCHEMA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote; raises `InputError` for files that are damaged, foreign or newer."""
        tensors, header = storage.load_tensors(path, kind="statistics", schema=SCHEMA)
        try:
            layers = {}
            for name, k, n, owner, tokens in header["layers"]:
                sums = {key: tensors.get(f"{name}|{key}") for key in _SUMS}
                layers[name] = LayerStatistics(name, int(k), int(n), owner, int(tokens), **sums)
                layers[name].check_shapes()
            _share_moments(layers)
            return cls(
                layers,
                header["fingerprint"],
                tuple(header["objectives"]),
                tuple(header["extras"]),
                int(header["samples"]),
                int(header["seed"]),
                int(header["images"]),
                int(header["macs"]),
                _as_tuple(header["input_shape"]),
                dict(header["notes"]),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise InputError(f"{path}: its statistics are damaged ({cause!r}); calibrate again") from cause


def _share_moments(layers: Mapping[str, LayerStatistics]) -> None:
    for layer in layers.values():
        if layer.owner != layer.name:
            layer.moment = layers[layer.owner].moment


def _as_tuple(shape: Any) -> Any:
    """JSON has lists where Python has shapes."""
    if isinstance(shape, dict):
        return {key: tuple(value) for key, value in shape.items()}
    return None if shape is None else tuple(shape)


_SEEN = 1e-3  # of the largest singular value of W: below, G holds more rounding than signal


def _inputs_from_outputs(G: Tensor, W: Tensor) -> Tensor:
    """The C with `W C Wᵀ = G` that is isotropic where W does not look: `W⁺ G W⁺ᵀ + c (1 - W⁺ W)`, c its mean there.

    For a square W it is C itself; for N < K it is what the outputs know of C.
    """
    inverse = torch.linalg.pinv(W, rtol=_SEEN)
    C = inverse @ G @ inverse.mT
    one = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    return C + C.trace() / min(W.shape) * (one - inverse @ W)
