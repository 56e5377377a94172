"""Training that takes milliseconds."""

from __future__ import annotations

import pytest
import torch

from vitlr.training import TrainRecipe


@pytest.fixture
def labelled() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(4):
        images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        images[torch.arange(8), labels] += 1
        batches.append((images, labels))
    return batches


@pytest.fixture
def quick() -> TrainRecipe:
    """Two epochs at a rate that moves gates."""
    return TrainRecipe(epochs=2, lr=0.01, warmup_epochs=0, weight_decay=0.0, amp=False, smoothing=0.0)
