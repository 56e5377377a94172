"""What rounding the matrices beside the linears would cost: embeddings, positions, the head.

Which matrix is rounded to how many bits is known before an image is seen, and so is the error `E = Ŵ − W`. To second
order it costs `½ E_images[(Σ_ij g_ij E_ij)²]` nats, g the gradient of the loss by W. Errors of rows that have exponents
of their own have nothing to do with each other, so rows count one by one; and since signs are drawn for every
image, its gradients have a mean of 0, so that the square of a batch's sum is the sum of squares expected.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from vitlr.measuring.cost import rest
from vitlr.runtime import compact


class Others:
    """Gradients of all matrices beside the linears named, while it is entered; their errors are held by bits."""

    def __init__(self, model: nn.Module, names: Container[str]) -> None:
        own = {id(tensor) for tensor in rest(model, names)}
        found = {name: p for name, p in model.named_parameters() if id(p) in own and compact.is_coded(p)}
        self.matrices = found
        self.errors = {name: [_error(p.detach(), bits) for bits in compact.BITS] for name, p in found.items()}

    def __enter__(self) -> Others:
        self._before = {name: (p.requires_grad, p.grad) for name, p in self.matrices.items()}
        for p in self.matrices.values():
            p.requires_grad_(True).grad = None
        return self

    def __exit__(self, *cause: object) -> None:
        for name, p in self.matrices.items():
            asked, p.grad = self._before[name]
            p.requires_grad_(asked)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add `Σ_i (Σ_j g_ij E_ij)²` of a batch's gradients to what there is by name, one number for each of `BITS`."""
        for name, p in self.matrices.items():
            if p.grad is None:  # nothing depends on it, or it is not known what does
                continue
            g = compact.by_row(p.grad)
            found = torch.stack([(g * E).sum(1).double().square().sum() for E in self.errors[name]])
            sums[name] = sums[name].to(found.device) + found if name in sums else found
            p.grad = None


def _error(value: Tensor, bits: int) -> Tensor:
    return compact.by_row(compact.rounded(value, bits) - value)
