"""The learnt residual: exact merging, the principal part, gain on tokens held out."""

from __future__ import annotations

import pytest
import torch

import vitlr
from vitlr.nn import LowRankLinear
from vitlr.refinement.regrow import _error, _Tokens, learn, principal


@pytest.fixture
def problem():
    """A dense layer, a poor low-rank layer for it, and tokens of strongly unequal directions."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(12, 10, generator=generator)
    x = torch.randn(40, 16, 10, generator=generator) * torch.logspace(0, -2, 10)
    layer = LowRankLinear.from_factors(*_svd(W, 4), torch.zeros(12))
    tokens = _Tokens(list(x), list(x @ W.mT))
    return W, layer, tokens


def _svd(W, rank):
    U, S, Vh = torch.linalg.svd(W)
    return U[:, :rank] * S[:rank], Vh[:rank]


def test_the_principal_part_is_the_best_for_the_layers_outputs(problem):
    _, layer, tokens = problem
    A, B, x = layer.up.weight.detach(), layer.down.weight.detach(), torch.cat(tokens.x)
    A1, B1 = principal(A, B, x, 2)
    outputs = (x @ B.mT @ A.mT).double()
    lost = (outputs - x.double() @ B1.double().mT @ A1.double().mT).square().sum()
    best = torch.linalg.svdvals(outputs)[2:].square().sum()
    assert A1.shape == (12, 2) and B1.shape == (2, 10)
    torch.testing.assert_close(lost, best, rtol=1e-3, atol=1e-6)


def test_the_residual_lowers_the_error_at_the_same_rank(problem):
    _, layer, tokens = problem
    (_, held) = tokens.split()
    before = _error(layer.up.weight, layer.down.weight, layer.up.bias, *held)
    assert learn(layer, tokens, 2, 300, torch.Generator().manual_seed(0))
    after = _error(layer.up.weight, layer.down.weight, layer.up.bias, *held)
    assert layer.rank == 4 and layer.up.weight.shape == (12, 4) and after < 0.7 * before


def test_a_layer_that_gains_nothing_keeps_its_factors(problem):
    W, _, tokens = problem
    layer = LowRankLinear.from_factors(W, torch.eye(10), torch.zeros(12))
    before = [p.clone() for p in layer.parameters()]
    assert not learn(layer, tokens, 2, 5, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("parallel", [False, True])
def test_plainly_cut_layers_come_nearer(pair, proxy_images, quick, parallel):
    """Factors that know nothing of the inputs leave room for a residual that does."""
    dense, small = pair
    for name, module in list(small.named_modules()):
        if isinstance(module, LowRankLinear):
            A, B = _svd(dense.get_submodule(name).weight.detach(), module.rank)
            with torch.no_grad():
                module.up.weight.copy_(A)
                module.down.weight.copy_(B)
    quick |= {"regrow_steps": 150, "regrow_share": 0.25}
    refined = vitlr.refine(small, dense, proxy_images, rungs=["regrow"], parallel=parallel, **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.kept and rung.after.kl < rung.before.kl and not rung.note.startswith("0 of")
    shapes = [p.shape for p in small.parameters()]
    assert [p.shape for p in refined.parameters()] == shapes
    again = vitlr.refine(small, dense, proxy_images, rungs=["regrow"], parallel=parallel, **quick)
    assert all(torch.equal(a, b) for a, b in zip(refined.parameters(), again.parameters(), strict=True))
