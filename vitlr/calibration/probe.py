"""One image through the model before calibration: who is called, who shares an input, what a forward pass costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, first_tensor, tensors
from vitlr.errors import InputError, VitlrError
from vitlr.measuring import cost
from vitlr.measuring.reach import changes, reached
from vitlr.runtime.words import some

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """What one image showed: MACs, the layer that first read each layer's input, leading sizes of the inputs.

    And which layers are never called, so that nothing else is known of them.
    """

    macs: int
    owners: dict[str, str]
    leading: dict[str, frozenset[int]]
    silent: frozenset[str]


_BY_NAME = "; several inputs come as dicts, under the names that its forward has for them"


def probe(model: nn.Module, targets: Mapping[str, nn.Linear], image: Any) -> Probe:
    """Send one image (a batch of one) through; `InputError` where the model cannot take it or calls no target.

    A warning names those that it does not call.
    """
    # Holding the inputs keeps their identities apart; a version is another tensor, since it was written to in between.
    sources: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in targets}
    handles = [linear.register_forward_pre_hook(_remember(sources[name], name)) for name, linear in targets.items()]
    try:
        macs = cost.count_macs(model, image)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, VitlrError):
            raise
        given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors(image))
        raise InputError(
            f"the model cannot take an image of the loader ({given}, with its batch dimension): {cause}"
            + (_BY_NAME if isinstance(cause, TypeError) and "missing" in str(cause) else "")
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in targets if not sources[name]]
    if len(silent) == len(targets):
        raise InputError(
            f"{len(silent)} linear layers are never called ({some(silent)}): "
            "the model reads their weights itself or does not use them, and replacing them would change nothing"
        )
    if silent:
        _logger.warning(
            "%d layers stay dense (%s): images do not call them, or the model reads past them",
            len(silent),
            some(silent),
        )
    first: dict[tuple[tuple[int, int], ...], str] = {}
    owners = {}
    for name, linear in targets.items():
        read = tuple((id(x), version) for x, version in sources[name])
        # The input's moment is kept where it is the smaller one; equal inputs then share it.
        owners[name] = first.setdefault(read, name) if linear.out_features > linear.in_features else name
    leading = {name: frozenset(x.shape[0] for x, _ in read) for name, read in sources.items()}
    return Probe(macs, owners, leading, frozenset(silent))


def strided_layers(model: nn.Module, targets: Mapping[str, nn.Linear], pair: Any, alone: Any) -> set[str]:
    """The layers that see the rows of one image `images` apart: views, frames or tokens before the images of a batch.

    Found by what they see of an image `alone` and in a `pair` that it is the first of. Raises `InputError` where an
    image is seen otherwise in company: then nothing can be said of one image.
    """
    with_another, by_itself = (_inputs(model, targets, inputs) for inputs in (pair, alone))
    found = set()
    for name in targets:
        for together, single in zip(with_another[name], by_itself[name], strict=False):
            rows = len(single)
            # Tokens before images: the rows of one image are never neighbours.
            if single.dim() > 2 and len(together) == rows and together.shape[1] == 2 * single.shape[1]:
                places: tuple[Tensor | None, Tensor] = (None, together[:, : single.shape[1]])
            elif len(together) == 2 * rows:
                places = (together[:rows], together[::2])
            else:
                continue  # no multiple of the images: refused by who splits them
            near, apart = (math.inf if t is None else float((t - single).norm()) for t in places)
            if min(near, apart) > _ALIKE * float(single.norm()):
                raise InputError(
                    f"layer {name} sees an image otherwise when another one is in the batch: sums over single images "
                    "mean nothing there; calibrate with objective='loss' or 'output'"
                )
            if apart < near and near > _ALIKE * float(single.norm()):
                found.add(name)
    return found


def unreached(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    image: Any,
    output_fn: Callable[[Any], Tensor] | None,
    by_gradient: bool = True,
) -> set[str]:
    """The layers that the answer does not depend on, unless that is all of them; a warning names them.

    Those that it depends on past autograd (no_grad, detach) are none of them: nothing could be said of these.
    """

    def pick(answer: Any) -> Tensor:
        return first_tensor(answer if output_fn is None else output_fn(answer))

    try:
        found = reached(model, targets, image, pick)
    except RuntimeError:  # an operation that autograd knows no way back through
        if by_gradient:
            raise
        return set()
    lost = [name for name in found if not found[name]]
    if len(lost) == len(found):
        lost = []
    lost = [name for name in lost if not changes(model, targets[name], image, pick)]
    if lost:
        _logger.warning(
            "%d layers stay dense (%s): the answer does not depend on them, they serve another output; output_fn= "
            "picks what counts",
            len(lost),
            some(lost),
        )
    return set(lost)


def embedding(model: nn.Module, targets: Mapping[str, nn.Linear], image: Any) -> set[str]:
    """The linear that makes tokens of an image's patches, if there is one: it stays dense, as a convolution would.

    No weights stand before it, and it gets as many numbers as the image has, in rows that hold pixels of all channels.
    """
    first: list[tuple[nn.Module, Tensor | None]] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not first:
            first.append((module, args[0] if args and isinstance(args[0], Tensor) else None))

    weighted = [m for m in model.modules() if isinstance(w := m._parameters.get("weight"), Tensor) and w.ndim > 1]
    handles = [module.register_forward_pre_hook(see) for module in weighted]
    try:
        with torch.no_grad():
            call(model, image)
    finally:
        for handle in handles:
            handle.remove()
    module, given = first[0] if first else (None, None)
    found = {name for name, linear in targets.items() if linear is module}
    if given is None or given.ndim < 3 or len(found) == len(targets):
        return set()
    pictures = [t for t in tensors(image) if t.ndim > 3]
    if not any(t.numel() == given.numel() and given.shape[-1] % t.shape[1] == 0 for t in pictures):
        return set()
    if found:
        _logger.info("%s stays dense: it embeds the patches of an image", some(sorted(found)))
    return found


def scalar(loss: Any) -> Tensor:
    """The loss of a `loss_fn`, if it is one."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InputError(f"loss_fn= returned {what}, expected one number as a tensor, summed over the images")
    return loss


def check_model(model: nn.Module) -> None:
    """Raise `InputError` for weights that are nowhere, or that autograd cannot follow."""
    for name, p in model.named_parameters():
        if p.is_meta:
            raise InputError(f"{name} is on the meta device: the model has no weights; load some first")
        if p.is_inference():
            raise InputError(
                f"{name} was made under torch.inference_mode(), autograd cannot follow it; make the model outside"
            )


_ALIKE = 0.05  # relative; batches of one and of two are rounded otherwise, in half precision by as much


def _inputs(model: nn.Module, targets: Mapping[str, nn.Linear], inputs: Any) -> dict[str, list[Tensor]]:
    """What every layer is called with, in float32."""
    seen: dict[str, list[Tensor]] = {name: [] for name in targets}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen[name].append(args[0].detach().float())

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in targets.items()]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _remember(seen: list[tuple[Tensor, int]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise InputError(
                f"layer {name} is called with keyword arguments only; pass its input as the first argument"
            )
        seen.append((args[0], args[0]._version))

    return hook
