"""One image through the model before calibration: who is called, who shares an input, what a forward pass costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitlr.data.batches import tensors
from vitlr.errors import InputError, VitlrError
from vitlr.measuring import cost
from vitlr.runtime.words import some


@dataclass(frozen=True)
class Probe:
    """What one image showed: MACs, the layer that first read each layer's input, leading sizes of the inputs."""

    macs: int
    owners: dict[str, str]
    leading: dict[str, frozenset[int]]


def probe(model: nn.Module, targets: Mapping[str, nn.Linear], image: Any) -> Probe:
    """Send one image (a batch of one) through; `InputError` where the model cannot take it or never calls a target."""
    # Holding the inputs keeps their identities apart; a version is another tensor, since it was written to in between.
    sources: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in targets}
    handles = [linear.register_forward_pre_hook(_remember(sources[name], name)) for name, linear in targets.items()]
    try:
        macs = cost.count_macs(model, image)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, VitlrError):
            raise
        given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors(image))
        raise InputError(
            f"the model cannot take an image of the loader ({given}, with its batch dimension): {cause}"
        ) from cause
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in targets if not sources[name]]
    if silent:
        raise InputError(
            f"{len(silent)} linear layers are never called ({some(silent)}): "
            "the model reads their weights itself or does not use them, and replacing them would change nothing; "
            "leave them out with exclude="
        )
    first: dict[tuple[tuple[int, int], ...], str] = {}
    owners = {}
    for name, linear in targets.items():
        read = tuple((id(x), version) for x, version in sources[name])
        # The input's moment is kept where it is the smaller one; equal inputs then share it.
        owners[name] = first.setdefault(read, name) if linear.out_features > linear.in_features else name
    return Probe(macs, owners, {name: frozenset(x.shape[0] for x, _ in read) for name, read in sources.items()})


def _remember(seen: list[tuple[Tensor, int]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise InputError(
                f"layer {name} is called with keyword arguments only; pass its input as the first argument"
            )
        seen.append((args[0], args[0]._version))

    return hook
