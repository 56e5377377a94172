"""Refinement that can be cut short: finished rungs, and the state of the distilling one."""

from __future__ import annotations

from types import MappingProxyType

from torch import nn

from vitlr.refinement.recipe import RENAMED, WORDS
from vitlr.refinement.report import Rung
from vitlr.runtime import snapshots
from vitlr.runtime.snapshots import restore, stored


class Snapshots(snapshots.Snapshots):
    """What a refinement has reached; see `vitlr.snapshots`."""

    kind = "refinement"
    words = MappingProxyType({**WORDS, **RENAMED})

    def save_rung(self, rung: Rung, model: nn.Module) -> None:
        """Keep the model as it left a rung, and drop what that rung kept on the way."""
        if self.folder is not None:
            self.save(f"after_{rung.name}", stored(model), rung.to_dict())
            self._path(rung.name).unlink(missing_ok=True)

    def load_rung(self, name: str, model: nn.Module) -> Rung | None:
        """Put the model where a finished rung had left it; None where that rung has not finished."""
        found = self.load(f"after_{name}")
        if found is None:
            return None
        tensors, state = found
        restore(model, tensors)
        return Rung.from_dict(state)
