"""The rung that rescales: its slopes and its step against what they are said to be, and what it repairs."""

from __future__ import annotations

import copy

import pytest
import torch

import vitlr
from vitlr.refinement.rescale import slopes, solved


def test_the_step_is_that_of_the_damped_gauss_newton_matrix():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(9, generator=generator), torch.randn(5, 9, generator=generator)
    for strength in (0.3, 3.0):
        H = (v.mT @ v / len(v)).double()
        ridge = strength * H.trace() / len(v)
        expected = -torch.linalg.solve(H + ridge * torch.eye(9), u.double())
        torch.testing.assert_close(solved(u, v, strength), expected, rtol=1e-5, atol=1e-6)


def test_slopes_by_gains_come_from_those_by_the_weights():
    torch.manual_seed(0)
    first, second, x = torch.randn(3, 4).requires_grad_(), torch.randn(2, 3).requires_grad_(), torch.randn(7, 4)
    a = torch.zeros(5, requires_grad=True)
    b, c = (1 + a).split([3, 2])
    (expected,) = torch.autograd.grad((torch.tanh(x @ first.mT * b) @ second.mT * c).square().sum(), a)
    grads = torch.autograd.grad((torch.tanh(x @ first.mT) @ second.mT).square().sum(), [first, second])
    torch.testing.assert_close(slopes([first, second], grads), expected)


@pytest.mark.parametrize("classes", [5, 0])
def test_rows_that_were_scaled_come_back_nearer_to_the_dense_model(tiny_vit, proxy_images, classes):
    dense = tiny_vit(num_classes=classes)
    narrow = vitlr.compress(dense, proxy_images, "params:80%", method="widths", width_step=8)
    with torch.no_grad():
        narrow.blocks[1].mlp.fc2.weight.mul_(1.6)
    spoilt = copy.deepcopy(narrow)
    refined = vitlr.refine(narrow, dense, proxy_images, rungs=["rescale"])
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.name == "rescale" and rung.kept and rung.after.kl < 0.7 * rung.before.kl
    moved = {n for n, p in refined.named_parameters() if not torch.equal(p, spoilt.get_parameter(n))}
    assert "blocks.1.mlp.fc2.weight" in moved and all(
        name.endswith("weight") and "norm" not in name and "head" not in name for name in moved
    )


def test_frozen_linears_stay_as_they_are_and_so_does_what_learns(tiny_vit, proxy_images):
    dense = tiny_vit()
    narrow = vitlr.compress(dense, proxy_images, "params:80%", method="widths", width_step=8)
    with torch.no_grad():
        narrow.blocks[1].mlp.fc2.weight.mul_(1.6)
    narrow.blocks[0].requires_grad_(False)
    refined = vitlr.refine(narrow, dense, proxy_images, rungs=["rescale"])
    for name, p in refined.named_parameters():
        own = narrow.get_parameter(name)
        assert p.requires_grad == own.requires_grad
        if name.startswith("blocks.0."):
            assert torch.equal(p, own)
    assert refined.vitlr_refinement.rungs[0].kept
