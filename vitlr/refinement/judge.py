"""How far a model is from the dense one on the held-out images: the judge of every rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.errors import NumericalError
from vitlr.measuring.losses import agreeing, divergence, divergences, first_tensor, is_logits
from vitlr.runtime import processes
from vitlr.runtime.contexts import evaluation_mode


@dataclass(frozen=True)
class Distance:
    """`kl` in nats (half the squared distance of normalised features without logits), `agreement` in percent."""

    kl: float
    agreement: float | None

    def __str__(self) -> str:
        return f"KL {self.kl:.4f}" + ("" if self.agreement is None else f", agreement {self.agreement:.1f} %")


class Judge:
    """Compares models with the dense one on `images`, whose dense answers are computed once.

    Raises `NumericalError` where the dense answers hold NaN or Inf; a model whose answers do is infinitely far.
    """

    def __init__(
        self,
        reference: nn.Module,
        images: Tensor,
        batch_size: int,
        output_fn: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.images, self.batch_size, self.output_fn = images, batch_size, output_fn
        self.logits = False
        self.expected = self._answers(reference)
        if not torch.isfinite(self.expected).all():
            raise NumericalError("the dense model's answers hold NaN or Inf; check its weights, or use float32")

    def __call__(self, model: nn.Module) -> Distance:
        answers = self._answers(model)
        if not torch.isfinite(answers).all():
            return Distance(math.inf, None)
        agreement = None
        if self.logits:
            agreement = 100 * float(agreeing(self.expected, answers).double().mean())
        return Distance(float(divergence(self.expected, answers, self.logits)), agreement)

    def each(self, model: nn.Module) -> Tensor:
        """The distance of every image `[images]`, in float64; infinite where an answer holds NaN or Inf."""
        answers = self._answers(model)
        finite = torch.isfinite(answers).all(1)
        return divergences(self.expected, answers, self.logits).where(finite, math.inf)

    @torch.no_grad()
    def _answers(self, model: nn.Module) -> Tensor:
        def answered(own: Sequence[Tensor]) -> Iterator[tuple[bool, Tensor]]:
            for images in own:
                answer = self.pick(model(to_model(model, images)))
                yield is_logits(model, answer), first_tensor(answer).double().flatten(1).cpu()

        with evaluation_mode(model):
            found = [*processes.shared_out(answered, self.images.split(self.batch_size))]
        self.logits = found[-1][0]
        return torch.cat([answers for _, answers in found])

    def pick(self, answer: Any) -> Any:
        """What of a model's answer counts."""
        return answer if self.output_fn is None else self.output_fn(answer)
