"""Training with labels: what fine-tuning and learnt pruning share."""

from typing import TYPE_CHECKING

from vitlr.runtime.lazy import lazily

if TYPE_CHECKING:
    from vitlr.training.loop import TrainStep, train
    from vitlr.training.recipe import TrainRecipe
    from vitlr.training.report import Epoch, TrainReport

__all__ = ["Epoch", "TrainRecipe", "TrainReport", "TrainStep", "train"]

__getattr__ = lazily(
    __name__,
    {
        "vitlr.training.loop": ["TrainStep", "train"],
        "vitlr.training.recipe": ["TrainRecipe"],
        "vitlr.training.report": ["Epoch", "TrainReport"],
    },
)
