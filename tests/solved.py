"""The spectra of everything of one kind that can get narrower, as a plan would have them."""

from vitlr.anatomy.reading import read
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.solving import solve


def solved(model, stats, kind, objective=None, step=0, **options):
    options = Decomposition(objective=objective, **options)
    return solve(read(model), stats, Objective.of(stats, options), [kind], options, step=step).widths
