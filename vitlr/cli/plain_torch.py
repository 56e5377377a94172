"""A model without vitlr's kernels, to see what they bring."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from vitlr.ops.dispatch.registry import VARIABLE


class PlainTorch(nn.Module):
    """Runs a model with every kernel of vitlr off, as `VITLR_BACKEND=torch` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "torch"
        try:
            return self.model(*args)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
