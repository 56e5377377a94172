"""`fp8_chain` by torch's own product of 8-bit floats: the reference's answer, and which calls it leaves to others."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch

from vitlr.ops.backends import scaled_mm
from vitlr.ops.dispatch import registry
from vitlr.ops.layers import fp8_chain


def chain(widths, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    steps = [fp8_chain.step_of(draw(N, K) / K**0.5, draw(N) if bias else None) for K, N in pairwise(widths)]
    x = draw(3, 17, widths[0]).to(dtype)
    columns = [list(column) for column in zip(*steps, strict=True)]
    return x, columns, draw(3, 17, widths[-1]).to(dtype), (draw(widths[0]).to(dtype), draw(widths[0]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("widths", "acts"),
    [
        ((32, 48), ("none",)),
        ((32, 16, 64, 16, 32), ("none", "gelu", "none", "none")),
        ((16, 32, 16), ("sigmoid", "relu")),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_it_answers_as_the_reference_does(dtype, widths, acts, whole):
    x, columns, residual, norm = chain(widths, dtype, bias=whole)
    rest = (residual if whole else None, acts, norm if whole else (), 1e-6)
    expected, found = fp8_chain.reference(x, *columns, *rest), scaled_mm.run(x, *columns, *rest)
    double = (residual.double() if whole else None, acts, [t.double() for t in norm] if whole else (), 1e-6)
    exact = fp8_chain.reference(x.double(), *columns, *double)
    assert found.dtype == dtype and found.shape == expected.shape
    # A value between two codes may fall to either side where sums are rounded otherwise: of both, the same is asked.
    allowed = (1.01 if dtype == torch.float32 else 1.3) * (expected.double() - exact).norm()
    assert (found.double() - exact).norm() <= allowed


def test_rows_of_any_size_keep_their_scale():
    x, columns, *_ = chain((32, 48), torch.float32)
    columns[2] = [None]
    for power in (-40, 0, 40):
        found = scaled_mm.run(x * 2.0**power, *columns, None, ("none",))
        torch.testing.assert_close(found, fp8_chain.reference(x, *columns, None, ("none",)) * 2.0**power)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (fp8_chain.Key(5, (32, 40), ("none",)), r"widths \[32, 40\], expected multiples of 16"),
        (fp8_chain.Key(5, (32, 48), ("none",), dtype=torch.float16), "float16 on cpu"),
        (fp8_chain.Key(5, (32, 48), ("none",), device=torch.device("cuda")), "ends in torch.bfloat16"),
    ],
)
def test_what_it_does_not_take_is_said(key, why):
    assert re.search(why, scaled_mm.objection(key))


def test_cards_without_8_bit_floats_are_left_alone(monkeypatch):
    key = fp8_chain.Key(5, (32, 48), ("none",), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert (scaled_mm.objection(key) is None) == able


def test_dispatch_takes_it_before_what_never_ran():
    able = [c.name for c in registry.candidates(fp8_chain.OP) if c.ran_on]
    assert able == ["torch", "torch.scaled_mm"]
