"""What a model's answers are worth: losses drawn from the answers themselves, and the divergence of two models'."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.data.batches import first_tensor
from vitlr.errors import InputError, NumericalError
from vitlr.runtime.modules import read_freely, unwrapped

_LEAST = 1e-300  # what is left to other classes, below which nothing is
_WHOLE = 1e-2  # how far the sum of an image's probabilities may be off one, in half precision

__all__ = [
    "agreeing",
    "check_reached",
    "classes_said",
    "contrasts",
    "divergence",
    "draws",
    "first_tensor",
    "image_seeds",
    "is_logits",
    "kl",
    "logits_in",
    "sampled_losses",
    "what_is",
]


def image_seeds(inputs: Sequence[Tensor], seed: int) -> list[int]:
    """One seed per image, from its content in all tensors: batch size, order and merging then change no draw."""
    seeds = [seed & 0xFFFFFFFF] * inputs[0].shape[0]
    for images in inputs:
        rows = images.detach().cpu().contiguous().view(torch.uint8).reshape(images.shape[0], -1).numpy()
        seeds = [zlib.crc32(row.data, start) for row, start in zip(rows, seeds, strict=True)]
    return seeds


def draws(seeds: Sequence[int], samples: int, shape: Sequence[int], kind: Callable[..., Tensor]) -> Tensor:
    """`samples` draws of `shape` for each seed, as `[samples, images, *shape]` on the CPU."""
    rows = [kind((samples, *shape), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows, dim=1)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator).mul_(2).sub_(1).double()


def contrasts(logits: Tensor, signs: Tensor) -> Tensor:
    """`w = L ε` of signs ε `[..., images, classes]`, `L Lᵀ = F = diag p − p pᵀ`, p = softmax(logits): `E[w wᵀ] = F`.

    L is F's Cholesky factor, classes from the likeliest to the least likely. Its column k sets class k against all
    after it, `√(p_k s_{k+1} / s_k) (e_k − Σ_{j>k} p_j / s_{k+1} e_j)` with `s_k = Σ_{j≥k} p_j`. Only F's eigenvectors
    are as even: an image's one doubt is in every draw, where a class drawn from p mostly finds none.
    """
    p, order = torch.sort(logits.detach().double().softmax(-1), dim=-1, descending=True, stable=True)
    s = p.flip(-1).cumsum(-1).flip(-1)
    after = torch.cat([s[:, 1:], torch.zeros_like(s[:, :1])], -1)
    own = signs.gather(-1, order.expand_as(signs)) * (p * after / s.clamp(min=_LEAST)).sqrt()
    handed = torch.where(after > _LEAST, own / after.clamp(min=_LEAST), 0.0)  # to each later class, times its share
    w = own - p * (handed.cumsum(-1) - handed)
    return torch.zeros_like(w).scatter(-1, order.expand_as(w), w)


def is_logits(model: nn.Module, answer: Any) -> bool:
    """Whether the answer is a classifier's `[images, classes]` rather than features."""
    return what_is(model, answer)[0]


def what_is(model: nn.Module, answer: Any) -> tuple[bool, str]:
    """Whether an answer is a classifier's logits, and in one line what it is taken for.

    It is what the answer calls by that name, or `[images, classes]` as wide as the model's last linear, its classifier;
    what the model says of itself counts only where that is no linear: it goes stale when a head is put in its place.
    """
    output = first_tensor(answer)
    shape = f"[images{''.join(f', {n}' for n in output.shape[1:])}]"
    if output.flatten(1).shape[1] == 1:
        return False, "one number an image: its squared change counts"
    features = f"features {shape}: the squared change of their direction counts"
    if output.ndim != 2:
        return False, features
    if read_freely(output) and bool(_sums_to_one(output.detach())):  # elsewhere it is not waited for
        return True, f"probabilities {shape}, their logarithms for logits"
    if not isinstance(answer, Tensor) and output is _named(answer):
        return True, f"logits {shape}, so named in the answer"
    heads = linears.classifier_names(model)
    wide = [name for name in heads if getattr(model.get_submodule(name), "out_features", None) == output.shape[1]]
    if wide:
        projection = re.search(r"(proj|projection|embed\w*)$", wide[-1])
        return (False, features) if projection else (True, f"logits {shape} of {wide[-1]}")
    said = classes_said(model)
    if not heads and said == output.shape[1]:
        return True, f"logits {shape}, as many as the model has classes"
    return False, features


def logits_in(answer: Tensor) -> Tensor:
    """Logits of an answer `[images, classes]`: `log p` where every row is a distribution, else as they are."""
    probabilities = _sums_to_one(answer.detach())  # a tensor: a device that runs behind is not waited for
    return torch.where(probabilities, answer.clamp(min=torch.finfo(answer.dtype).tiny).log(), answer)


def _sums_to_one(answer: Tensor) -> Tensor:
    return (answer >= 0).all() & ((answer.sum(-1, dtype=torch.float32) - 1).abs() < _WHOLE).all()


def classes_said(model: nn.Module) -> int | None:
    """timm's num_classes or transformers' config.num_labels; None if unsaid."""
    model = unwrapped(model)
    for holder, name in ((model, "num_classes"), (getattr(model, "config", None), "num_labels")):
        found = getattr(holder, name, None)
        if isinstance(found, int):
            return found
    return None


def _named(answer: Any) -> Any:
    return answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)


def sampled_losses(model: nn.Module, answer: Any, seeds: Sequence[int], samples: int) -> list[Tensor]:
    """`samples` scalar losses, each summed over the images, whose gradients' second moment is the Fisher matrix.

    Logits z: `⟨w, z⟩` with the `w` of `contrasts`, so that `½ E[(gᵀδ)²]` estimates the KL divergence that a small
    change δ causes. Features f: `⟨ε, f / ‖f‖⟩` with Gaussian ε, so that the
    same expression estimates half the squared change of the normalised feature; of one number z, whose direction is its
    sign and never changes, `ε z`. Raises `NumericalError` for an output on the
    CPU that is not finite.
    """
    output = first_tensor(answer)
    if read_freely(output) and not torch.isfinite(output).all():  # elsewhere sums are looked at, in the end
        raise NumericalError("the model's output holds NaN or Inf; check the weights and the images, or use float32")
    if is_logits(model, answer):
        output = logits_in(output)
        signs = draws(seeds, samples, output.shape[1:], _signs).to(output.device)
        return [(output.float() * w).sum() for w in contrasts(output, signs).float()]
    features = directions(output.float())
    noise = draws(seeds, samples, features.shape[1:], torch.randn).to(features)
    return [(features * direction).sum() for direction in noise]


def largest_doubt(model: nn.Module, answer: Any) -> Tensor:
    """The largest `1 − max softmax` of a batch of logits: what the least certain answer leaves to all other classes.

    Features, which have no classes, leave everything: 1. It stays on the answer's device.
    """
    if not is_logits(model, answer):
        return torch.ones(())
    return 1 - logits_in(first_tensor(answer).detach().double()).softmax(-1).amax(-1).amin()


def certain(doubt: float) -> str:
    """What is said of predictions for a model whose answers leave so little to other classes."""
    return (
        f"the model is certain of every answer (at most {doubt:.0e} is left to other classes), so gradients vanish: "
        "predicted losses are far too small and not to be trusted; objective='output' needs no gradients"
    )


def check_reached(loss: Tensor) -> None:
    """`InputError` for a loss that depends on nothing trainable: `backward` would fail, or train nothing."""
    if not loss.requires_grad:
        raise InputError("no gradient reaches a parameter that is not frozen; set requires_grad where it should train")


def divergence(expected: Tensor, answers: Tensor, logits: bool, temperature: float = 1.0) -> Tensor:
    """The mean over images of `divergences`."""
    return divergences(expected, answers, logits, temperature).mean()


def divergences(expected: Tensor, answers: Tensor, logits: bool, temperature: float = 1.0) -> Tensor:
    """`T² KL(softmax(e/T) || softmax(a/T))` of every image, or `½ ‖e/‖e‖ − a/‖a‖‖²` for features.

    `½ (e − a)²` for one number an image.
    """
    if not logits:
        return 0.5 * (directions(expected) - directions(answers)).square().sum(1)
    expected, answers = logits_in(expected), logits_in(answers)
    return temperature**2 * _kl(expected / temperature, answers / temperature)


def directions(features: Tensor) -> Tensor:
    """`f / ‖f‖` of every image's features `[images, ...]`, or f as it is where it is one number."""
    flat = features.flatten(1)
    return flat if flat.shape[1] == 1 else F.normalize(flat, dim=1)


def kl(expected: Tensor, answers: Tensor) -> Tensor:
    """`KL(softmax(e) || softmax(a))` of every image, in nats."""
    return _kl(logits_in(expected), logits_in(answers))


def _kl(expected: Tensor, answers: Tensor) -> Tensor:
    p, q = expected.log_softmax(1), answers.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def agreeing(expected: Tensor, answers: Tensor) -> Tensor:
    """Whether the largest logit is that of the same class, image by image."""
    return expected.argmax(1) == answers.argmax(1)
