"""What is left of a layer scale whose factors were multiplied into the linear before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlr.nn._fused import StandIn


class FoldedScale(StandIn):
    """Passes its input through: `x · 1`. Holds `gamma` [N], all ones, so that state_dict keys do not change.

    `back` gives the original module back, with ones: the linear before it keeps the factors.
    """

    def __init__(self, scale: nn.Module) -> None:
        super().__init__(scale)
        gamma = scale.get_parameter("gamma")
        # Nothing depends on it any more: an optimiser must not move it, and DDP would wait for its gradient.
        self.gamma = nn.Parameter(torch.ones_like(gamma), requires_grad=False)
        self._trained = gamma.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        gamma = state_dict.get(f"{prefix}gamma")
        if gamma is not None and not bool((gamma == 1).all()):
            # args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            args[-1].append(f"{prefix}gamma is not all ones, and here it is folded: load into the unfused model")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def back(self) -> nn.Module:
        """The original module with `gamma` all ones, on this module's device and in its dtype."""
        scale = self.original
        scale.gamma = nn.Parameter(self.gamma.detach().clone(), requires_grad=self._trained)
        return scale.train(self.training)
