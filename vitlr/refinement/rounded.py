"""Rounded layers while they are trained: found, loosened, held to the bytes that they had, and put back as integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.nn import QuantizedLinear
from vitlr.nn.latent_linear import LatentLinear, nearest
from vitlr.nn.quantized_linear import LARGEST
from vitlr.runtime import compact
from vitlr.runtime.coding import size
from vitlr.runtime.modules import swap

_SPARE = 5e-4  # of the bytes: before codes are packed, their size is known to about that and 2 bytes a layer
_NEAR = 2.0**-12  # of a step: how well the least way towards zero that is enough is known
_EASE = 0.998  # of the bytes: those beyond pull, so that few codes are left to be drawn towards zero by force
_PULL = 5.0  # steps a bit and unit of rate, for as many bytes again


class Loosened:
    """The rounded layers of a model as `LatentLinear`s, in place, until `fasten`.

    Frozen layers stay integers. Every other matrix is held where it was rounded to: 7 bits a row are near enough.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, LatentLinear] = {}
        for name in free_rounded_layers(model):
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            self.layers[name] = LatentLinear(layer)
            swap(model, name, self.layers[name])
        self.held = [p for p in self.vectors if compact.is_matrix(p)]
        for matrix in self.held:
            matrix.requires_grad_(False)
        self.limit = self.bytes()
        self.settled = (1 - _SPARE) * self.limit - 2 * len(self.layers)

    @property
    def latents(self) -> list[nn.Parameter]:
        """u of all layers."""
        return [layer.latent for layer in self.layers.values()]

    @property
    def vectors(self) -> list[nn.Parameter]:
        """All else that is trained, which a file holds in float16."""
        own = {id(u) for u in self.latents}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]

    def bytes(self, towards_zero: float = 0.0) -> float:
        """What the codes take, were all latent weights nearer to 0 by a share of a step."""
        return sum(size(nearest(u.detach(), towards_zero)) for u in self.latents)

    @torch.no_grad()
    def press(self, lr: float) -> None:
        """Pull every latent weight towards codes that take fewer bits, the more bytes they take beyond
        0.998 of the limit.

        A code k of share p_k takes `b_k = -log2 p_k` bits; `u ← u - pull · lr · (b_⌊u⌋+1 - b_⌊u⌋)`.
        """
        pull = _PULL * lr * (self.bytes() / max(_EASE * self.limit, 1.0) - 1)
        for u in self.latents if pull > 0 else ():
            below = (u.floor().to(torch.int64) + LARGEST).clamp_(0, 2 * LARGEST - 1)
            u.sub_(pull * _bits(nearest(u)).diff()[below])

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weights where they are stored: vectors in float16, latent weights at codes that keep to the limit.

        Where they take more, all come nearer to 0 by the least share of a step that is enough.
        """
        for p in self.vectors:
            p.copy_(compact.rounded(p))
        low, high = 0.0, float(self.bytes() > self.settled)
        while high - low > _NEAR:
            middle = (low + high) / 2
            low, high = (middle, high) if self.bytes(middle) > self.settled else (low, middle)
        for u in self.latents:
            u.copy_(nearest(u, high))

    def fasten(self) -> None:
        """Put the integers back, and free what was held."""
        for name, layer in self.layers.items():
            swap(self.model, name, layer.quantized())
        for matrix in self.held:
            matrix.requires_grad_(True)


def rounded_layers(model: nn.Module) -> list[str]:
    """Names of the rounded layers in the order in which the model lists them."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


def free_rounded_layers(model: nn.Module) -> list[str]:
    """Those that are not frozen: by their bias, or where they have none by the parameters of what they are part of."""

    def free(name: str) -> bool:
        parts = name.split(".")
        around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1))
        found = next((own for module in around if (own := [p.requires_grad for p in module.parameters()])), [True])
        return any(found)

    return [name for name in rounded_layers(model) if free(name)]


def _bits(codes: Tensor) -> Tensor:
    """What each of ±127 takes, by how often it comes."""
    counts = torch.bincount(codes.flatten().to(torch.int64) + LARGEST, minlength=2 * LARGEST + 1)
    return -((counts + 0.5) / counts.sum()).log2()
