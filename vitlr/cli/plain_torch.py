"""A model without vitlr's kernels, to see what they bring."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitlr.ops.dispatch.registry import backend


class PlainTorch(nn.Module):
    """Runs a model with every kernel of vitlr off, as `VITLR_BACKEND=torch` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        with backend("torch"):
            return self.model(*args)
