"""What a model is made of: its linears, MLPs and attentions, each looked for once."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from vitlr.anatomy.attention import Attention, attentions, why_no_scores
from vitlr.anatomy.mlps import Mlp, find_mlps


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one model by name, in module order; finding MLPs traces their forwards, so it waits until asked."""

    model: nn.Module

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """Everything that is an `nn.Linear`, whatever it is for."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}

    @cached_property
    def mlps(self) -> dict[str, Mlp]:
        """The MLPs whose hidden neurons can go."""
        return find_mlps(self.model)

    @cached_property
    def attentions(self) -> dict[str, Attention]:
        """The attentions whose value channels can go."""
        return attentions(self.model)[0]

    @cached_property
    def query_keys(self) -> dict[str, Attention]:
        """The attentions whose queries and keys can be rotated."""
        refused = why_no_scores(self.model)
        return {name: attention for name, attention in self.attentions.items() if name not in refused}

    def mlps_among(self, measured: Container[str]) -> dict[str, Mlp]:
        """The MLPs all of whose linears were measured."""
        return {name: mlp for name, mlp in self.mlps.items() if all(linear in measured for linear in mlp.linears)}

    def weights(self, names: Container[str]) -> dict[str, Tensor]:
        """The weights of those of its linears that are named."""
        return {name: linear.weight for name, linear in self.linears.items() if name in names}


def read(model: nn.Module) -> Parts:
    """The parts of a model."""
    return Parts(model)
