"""How long models take for an image, in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vitlr.measuring import timing
from vitlr.measuring.clock import race
from vitlr.runtime.modules import device_of, like


def milliseconds(models: Mapping[str, nn.Module], size: Sequence[int], batch: int = 1) -> dict[str, float]:
    """Milliseconds an image [C, H, W] in batches of `batch`; on a CPU those of torch's threads as they are set."""
    first = next(iter(models.values()))
    if device_of(first).type != "cpu":
        found = timing.throughput(models, batch, input_size=size)
        return {name: times["batch_ms"] / batch for name, times in found.items()}
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).to(like(first).dtype)
    found_ms = race({name: (model, x) for name, model in models.items()}, torch.get_num_threads())
    return {name: ms / batch for name, ms in found_ms.items()}
