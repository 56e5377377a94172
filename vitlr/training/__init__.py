"""Training with labels: what fine-tuning and learnt pruning share."""

from vitlr.training.loop import TrainStep, train
from vitlr.training.recipe import TrainRecipe
from vitlr.training.report import Epoch, TrainReport

__all__ = ["Epoch", "TrainRecipe", "TrainReport", "TrainStep", "train"]
