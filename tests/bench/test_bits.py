"""The rival of `bench/compare/bits`: plain rounding in groups is what it says."""

import pytest
import torch

from bench.compare.bits import GROUP, grouped


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_have_as_many_values_as_their_bits_name(bits):
    W = torch.randn(5, 3 * GROUP)
    groups = grouped(W, bits).unflatten(1, (-1, GROUP)).flatten(0, 1)
    assert max(len(group.unique()) for group in groups) <= 2**bits
    span = W.unflatten(1, (-1, GROUP)).flatten(0, 1)
    step = (span.amax(1) - span.amin(1)) / (2**bits - 1)
    plain = ((span / step[:, None]).round() * step[:, None] - span).square().sum()
    assert (groups - span).square().sum() < plain
