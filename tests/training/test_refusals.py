"""What training refuses, before or at the first batch, in one sentence."""

from __future__ import annotations

import pytest
import torch

from vitlr import InputError
from vitlr.training import TrainRecipe, train

IMAGES, LABELS = torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (iter([(IMAGES, LABELS)]), "without a length"),
        ([], "no batches"),
        ([IMAGES], "no labels"),
        ([(IMAGES, LABELS[:3])], r"labels are \[3\]"),
        ([(IMAGES, LABELS.float())], r"torch.float32, expected \[4\] integers"),
        ([(IMAGES, LABELS + 1)], "labels from 1 to 4, the model has 4 classes"),
        ([(IMAGES, LABELS - 1)], "labels from -1 to 2"),
    ],
)
@pytest.mark.parametrize("choice", [{}, {"mixup": 0.5}])
def test_loaders(vit, quick, loader, said, choice):
    with pytest.raises(InputError, match=said):
        train(vit(), loader, TrainRecipe(**quick, **choice))


def test_a_loader_that_ends_early(vit, quick):
    class Short(list):
        def __iter__(self):
            return iter([self[0]])

    with pytest.raises(InputError, match="gave 1 batches, expected 2, its length"):
        train(vit(), Short([(IMAGES, LABELS)] * 2), TrainRecipe(**quick))


def test_models(vit, quick):
    loader, recipe = [(IMAGES, LABELS)], TrainRecipe(**quick)
    model = vit()
    with pytest.raises(InputError, match="same object"):
        train(model, loader, recipe, reference=model)
    with pytest.raises(InputError, match=r"reference answers \[4, 7\], the model \[4, 4\]"):
        train(model, loader, recipe, reference=vit(num_classes=7))
    with pytest.raises(InputError, match=r"torch\.bfloat16; training works in float32"):
        train(vit().bfloat16(), loader, recipe)
    with pytest.raises(InputError, match="frozen"):
        train(vit().requires_grad_(False), loader, recipe)
    apart = vit().requires_grad_(False)
    apart.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match="no gradient reaches a parameter that is not frozen"):
        train(apart, loader, recipe)
    with pytest.raises(InputError, match="inference_mode"), torch.inference_mode():
        train(model, loader, recipe)
    with pytest.raises(InputError, match="1 batches, grad_accum_steps=2"):
        train(model, loader, TrainRecipe(**quick, grad_accum_steps=2))
    assert not model.training  # modes come back after an error too


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"epochs": 0}, "epochs=0, expected a whole number from 1"),
        ({"epochs": 1.5}, "whole number"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"amp": "yes"}, "amp='yes', expected True or False"),
        ({"clip_grad": 0}, "clip_grad=0"),
        ({"clip_mode": "max"}, "unknown clip_mode 'max', expected one of norm, value, agc"),
        ({"keep": "first"}, "unknown keep 'first'"),
        ({"scale": (0.5, 2)}, "scale="),
        ({"opt": "adamx"}, "opt='adamx'"),
        ({"smoothing": 1}, "smoothing=1"),
        ({"distill_loss_weight": 2}, "distill_loss_weight=2"),
    ],
)
def test_recipes(choice, said):
    with pytest.raises(InputError, match=said):
        TrainRecipe(**choice)


def test_what_may_be_left_out():
    assert TrainRecipe(clip_grad=None).clip_grad is None and TrainRecipe().to_dict()["scale"] == [0.08, 1.0]
