"""Rounded tensors in few bytes: the same to the last bit, and nothing but that."""

from __future__ import annotations

import pytest
import torch

from vitlr.errors import InputError
from vitlr.runtime.compact import restored, rounded, shapes, stored

SHAPES = [(7,), (3, 3), (96, 64), (64, 3, 8, 8), (1, 197, 64), (), (4096, 2)]


def named(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"w{form}": part for form, part in parts.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e3])
def test_what_is_rounded_comes_back_to_the_last_bit(shape, scale):
    value = torch.randn(shape) * scale
    value = rounded(value * (torch.rand(shape[:1] or (1,)) > 0.2).float().reshape(-1, *[1] * (len(shape) - 1)))
    parts = named(stored(value))
    assert torch.equal(restored(parts, {"w": tuple(value.shape)})["w"], value)
    assert shapes({key: tuple(t.shape) for key, t in parts.items()}, {"w": tuple(value.shape)}) == {"w": value.shape}
    assert sum(t.nbytes for t in parts.values()) <= value.numel() * 2 or scale < 1e-6
    assert torch.equal(rounded(value), value)


@pytest.mark.parametrize("middle", [0, -700, 3000])
def test_exponents_come_back(middle):
    value = (torch.randn(300) * 12 + middle).round().short()
    parts = named(stored(value))
    assert torch.equal(restored(parts, {"w": (300,)})["w"], value) and parts["w|near"].nbytes == 302
    assert [*stored(torch.tensor([0, 300]).short())] == [""]
    assert shapes({"w|near": (302,)}, {}) == {"w": (300,)}
    with pytest.raises(InputError, match="no form of it that is known"):
        restored({"w|near": parts["w|near"][:2]}, {"w": (0,)})


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_stays_near(shape):
    value = torch.randn(shape)
    worst = value.abs().amax() / 126 * 2**0.125 if value.ndim > 1 else value.abs().amax() * 2**-11
    assert (rounded(value) - value).abs().max() <= worst


def test_what_was_not_rounded_is_stored_as_it_is():
    for value in (torch.randn(96, 64), torch.randn(3).double(), torch.tensor([1e6, torch.nan]), torch.arange(5)):
        assert [*stored(value)] == [""] and torch.equal(stored(value)[""].nan_to_num(), value.nan_to_num())
    big = torch.tensor([1e6, 1.0])
    assert torch.equal(rounded(big), big)


def test_what_is_damaged_is_refused():
    parts = named(stored(rounded(torch.randn(96, 64))))
    whole = {"w": (96, 64)}
    for wrong, words in (
        ({**parts, "w|exponent": parts["w|exponent"][:-1]}, "exponents are damaged"),
        ({**parts, "w|exponent": parts["w|exponent"] + 2000}, "exponents are damaged"),
        ({**parts, "w|codes": parts["w|codes"][:-3]}, "packed codes"),
        ({"w|exponent": parts["w|exponent"]}, "no form of it that is known"),
        ({**parts, "w": torch.zeros(96, 64)}, "no form of it that is known"),
        ({"w|half": torch.zeros(96, 64)}, "no form of it that is known"),
        ({"w|other": torch.zeros(96, 64)}, "no form of it that is known"),
        ({"v|half": torch.zeros(3).half(), **parts}, None),
    ):
        with pytest.raises(InputError, match=words or "no such tensor"):
            restored(wrong, whole)
