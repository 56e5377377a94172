"""The refit rung: the equations it solves, and that it stays where that does not help."""

from __future__ import annotations

import torch

import vitlr
from vitlr.nn import LowRankLinear
from vitlr.refinement.refit import ChannelSums, LayerSums


def test_the_solution_is_that_of_anchored_least_squares():
    generator = torch.Generator().manual_seed(0)
    z, A = torch.randn(50, 3, generator=generator).double() + 1, torch.randn(4, 3, generator=generator).double()
    b, y = torch.randn(4, generator=generator).double(), torch.randn(50, 4, generator=generator).double()
    layer = LowRankLinear.from_factors(A, torch.eye(3).double(), b)
    e = y - layer(z).detach()
    sums = LayerSums.empty(layer)
    sums.add(z[:20].reshape(2, 10, 3), e[:20].reshape(2, 10, 4))
    sums.add(z[20:], e[20:])
    for strength in (0.0, 0.1, 10.0, float("inf")):
        A1, b1 = sums.solve(A, b, strength)
        centred = z - z.mean(0)
        ridge = strength * centred.square().sum() / 3
        delta = (A1 - A).requires_grad_()
        shift = (b1 - b).requires_grad_()
        loss = (e - z @ delta.mT - shift).square().sum()
        if strength == float("inf"):
            assert torch.equal(A1, A)
            (gradient,) = torch.autograd.grad(loss, [shift])
        else:
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss + ridge * delta.square().sum(), [delta, shift])]
            )
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    plain, none = sums.solve(A, None, 0.0)
    assert none is None
    torch.testing.assert_close(plain - A, torch.linalg.lstsq(z, e).solution.mT)


def test_a_norm_is_solved_channel_by_channel():
    generator = torch.Generator().manual_seed(0)
    z, e = (torch.randn(50, 4, generator=generator).double() + 1 for _ in range(2))
    scale, shift = torch.rand(2, 4, generator=generator).double()
    sums = ChannelSums.empty(torch.nn.LayerNorm(4))
    sums.add(z[:20].reshape(2, 10, 4), e[:20].reshape(2, 10, 4))
    sums.add(z[20:], e[20:])
    for strength in (0.0, 0.1, 10.0):
        delta, moved = (new - old for new, old in zip(sums.solve(scale, shift, strength), (scale, shift), strict=True))
        ridge = strength * (z - z.mean(0)).square().sum() / 4
        delta, moved = delta.requires_grad_(), moved.requires_grad_()
        loss = (e - z * delta - moved).square().sum() + ridge * delta.square().sum()
        for gradient in torch.autograd.grad(loss, [delta, moved]):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_a_spoilt_norm_is_repaired_even_where_no_layer_is_low_rank(tiny_vit, proxy_images, quick):
    dense = tiny_vit()
    dense.head.weight.data *= 4
    narrow = vitlr.compress(dense, proxy_images, "params:80%", method="widths", width_step=8)
    with torch.no_grad():
        narrow.blocks[1].norm2.bias += 1
    refined = vitlr.refine(narrow, dense, proxy_images, rungs="regrow", **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.name == "refit" and rung.kept and rung.after.kl < 0.5 * rung.before.kl
    assert "of 5 norms" in rung.note and not rung.note.endswith("0 of 5 norms")
    moved = {n for n, p in refined.named_parameters() if not torch.equal(p, narrow.get_parameter(n))}
    assert moved and all("norm" in name for name in moved)


def test_a_spoilt_bias_is_repaired_and_only_A_biases_and_norms_move(pair, proxy_images, quick):
    dense, small = pair
    with torch.no_grad():
        small.blocks[1].mlp.fc1.up.bias += 2
    refined = vitlr.refine(small, dense, proxy_images, rungs=["refit"], **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.kept and rung.after.kl < 0.5 * rung.before.kl and "of 8 layers refitted" in rung.note
    moved = {n for n, p in refined.named_parameters() if not torch.equal(p, small.get_parameter(n))}
    assert moved and all(name.endswith((".up.weight", ".up.bias")) or "norm" in name for name in moved)


def test_a_layer_without_error_is_not_touched(pair, proxy_images, quick):
    """A model that equals the dense one, written as full-rank factors, has nothing to gain."""
    _, small = pair
    full = vitlr.to_dense(small)
    refined = vitlr.refine(small, full, proxy_images, rungs=["refit"], **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.before.kl < 1e-9 and rung.after.kl <= rung.before.kl
