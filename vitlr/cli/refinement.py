"""Refinement for `vitlr compress`: what the flags ask for, checked early, run late."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitlr.cli.result import resumable
from vitlr.cli.statistics import Request
from vitlr.errors import InputError
from vitlr.refinement import Refinement, refine
from vitlr.refinement.recipe import make_recipe, parse_rungs
from vitlr.runtime.progress import bar


@dataclass(frozen=True)
class RefineRequest:
    """`--refine`, `--resume` and the choices that go with them; None leaves a choice to the default."""

    rung: str
    resume: Path | None
    steps: int | None
    minutes: float | None
    lr: float | None
    seed: int | None

    @property
    def rungs(self) -> tuple[str, ...]:
        return parse_rungs(self.rung)

    @property
    def options(self) -> dict[str, Any]:
        given = {"steps": self.steps, "minutes": self.minutes, "lr": self.lr, "seed": self.seed}
        return {key: value for key, value in given.items() if value is not None}

    def check(self, data: str | None, plan_only: bool) -> None:
        """Refuse what cannot be refined before anything is read."""
        if "distil" not in self.rungs:
            for flag, value in (("--steps", self.steps), ("--minutes", self.minutes), ("--lr", self.lr)):
                if value is not None:
                    raise InputError(f"{flag} goes with --refine distil")
        if not self.rungs:
            if self.resume is not None:
                raise InputError("--resume goes with --refine refit, regrow or distil")
            return
        if plan_only:
            raise InputError("--refine needs a model, and --plan-only makes none; leave one of them out")
        if data is None:
            raise InputError("--refine needs images: add --data (a folder of images, a .tar or hfds/NAME)")
        make_recipe(self.options)
        if self.resume is not None and self.resume.exists() and not self.resume.is_dir():
            raise InputError(f"--resume {self.resume} is a file, expected a folder")

    def run(self, small: nn.Module, reference: nn.Module, request: Request) -> Refinement | None:
        """Refine in place on the images of the request; None without rungs."""
        if not self.rungs:
            return None
        loader = request.open(reference)
        how: dict[str, Any] = {"rungs": self.rungs, "resume": self.resume, **self.options}
        with resumable(self.resume), bar("refining", unit="steps") as progress:
            refine(small, reference, loader, inplace=True, progress=progress, **how)
        report = small.vitlr_refinement
        assert isinstance(report, Refinement)
        return report
