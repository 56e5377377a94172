"""What a family is: how a small model of it is made, and what its images are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


class Family(NamedTuple):
    """`make()` builds it as its library does, `shape` is that of one image."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    arguments: dict[str, Any] | None = None
    """What timm makes it from: what a file needs to say."""

    def make(self) -> nn.Module:
        """The model in eval mode, of weights under which answers depend on the images.

        Libraries begin with zeros and faint ones, which would hide mistakes.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().eval()
            for parameter in model.parameters():
                matrix = parameter.ndim > 1 and parameter.numel() > 0
                mean = 1.0 if not matrix and parameter.numel() and parameter.mean() > 0.5 else 0.0  # of a norm
                std = parameter[0].numel() ** -0.5 if matrix else 0.1
                parameter.data = mean + std * torch.randn(parameter.shape)
        return model
