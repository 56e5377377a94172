"""What one rung may take of the steps and the minutes of the whole ladder: an equal share of what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vitlr.refinement.recipe import Recipe
from vitlr.refinement.report import Rung
from vitlr.runtime import processes


@dataclass(frozen=True)
class Share:
    """So many steps (modules refitted, layers regrown, updates distilled) and minutes from now on; None has no end."""

    steps: int | None = None
    minutes: float | None = None
    start: float = field(default_factory=lambda: time.monotonic())

    @classmethod
    def of(cls, recipe: Recipe, done: Sequence[Rung], to_come: int) -> Share:
        """Of what the rungs that are done have left over, for each of those to come."""
        steps, minutes = recipe.steps, recipe.minutes
        if steps is not None:
            steps = max(steps - sum(_steps(rung, recipe) for rung in done), 0) // to_come
        if minutes is not None:
            minutes = max(minutes - sum(rung.seconds for rung in done) / 60, 0.0) / to_come
        return cls(steps, minutes)

    def most(self, steps: int) -> int:
        """Of so many steps that there are, those that may be done."""
        return steps if self.steps is None else min(steps, self.steps)

    def over(self, steps: int) -> bool:
        """Whether after so many steps there are none left, or no time."""
        late = self.minutes is not None and processes.agreed(self._late)
        return late or (self.steps is not None and steps >= self.steps)

    def _late(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.start >= 60 * self.minutes

    def bound(self, recipe: Recipe) -> Recipe:
        """The recipe of a rung that counts its own steps."""
        steps = recipe.steps if self.steps is None else max(self.steps, 1)
        return replace(recipe, steps=steps, minutes=None if self.minutes is None else max(self.minutes, 1e-6))


def _steps(rung: Rung, recipe: Recipe) -> int:
    """Those of a rung, of `regrow` its layers."""
    return rung.steps // recipe.regrow_steps if rung.name == "regrow" else rung.steps
