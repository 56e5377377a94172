"""Plain rounding: the nearest of as many values as the bits name, and a file of that size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitlr.anatomy.linears import targets
from vitlr.reporting import nearest as plain


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_packed_codes_take_their_bits_and_come_back(bits):
    codes = torch.randint(0, 2**bits, (5, 64))
    held = plain.packed(codes, bits)
    assert len(held) == 5 * 64 * bits // 8
    each = np.unpackbits(held.numpy())[: 5 * 64 * bits].reshape(-1, bits)
    assert np.array_equal(each @ (1 << np.arange(bits)[::-1]), codes.flatten().numpy())


@pytest.mark.parametrize("group", [64, 192])
def test_plain_rounding_takes_the_nearest_of_as_many_values_as_its_bits_name(group):
    W = torch.randn(5, 192)
    codes, step, zero = plain.rounded(W, 3, group)
    assert codes.shape == (5, 192 // group, group) and step.shape == zero.shape == (5, 192 // group, 1)
    assert codes.min() >= 0 and codes.max() <= 7 and torch.equal(codes, codes.round())
    groups, kept = W.unflatten(1, (-1, group)), (codes - zero) * step
    every = (torch.arange(8.0) - zero) * step
    assert torch.allclose((groups - kept).abs(), (groups[..., None] - every[..., None, :]).abs().amin(-1), atol=1e-6)


def test_a_row_that_no_group_divides_is_rounded_to_its_last_weight():
    W = torch.randn(3, 70)
    codes, step, zero = plain.rounded(W, 8, 64)
    kept = ((codes - zero) * step).flatten(1)
    assert kept.shape == (3, 128) and not kept[:, 70:].any()
    assert (kept[:, :70] - W).abs().amax() <= step.amax() / 2 * 1.01


@pytest.mark.parametrize(("bits", "group", "most"), [(8, None, 0.08), (4, 64, 0.5)])
def test_the_model_is_a_copy_whose_bytes_are_those_of_its_codes(tiny_vit, images, bits, group, most):
    model = tiny_vit()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small, size = plain.nearest(model, bits, group)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    weights = sum(linear.weight.numel() for linear in targets(model).values())
    assert weights * bits / 8 < size < 0.6 * sum(t.nbytes for t in before.values())
    assert all(len(small.get_submodule(name).weight[0, :64].unique()) <= 2**bits for name in targets(model))
    with torch.no_grad():
        expected, found = model(images), small(images)
    assert 0 < (expected - found).norm() < most * expected.norm()
