"""Codes as bytes: read back exactly, at their entropy, and never beyond what was asked for."""

from __future__ import annotations

import pytest
import torch

from vitlr.errors import InputError
from vitlr.runtime.coding import pack, size, unpack


def normal(spread: float, shape: tuple[int, int] = (96, 500)) -> torch.Tensor:
    return (torch.randn(shape) * spread).round().clamp(-127, 127).to(torch.int8)


def entropy(codes: torch.Tensor) -> float:
    share = codes.flatten().unique(return_counts=True)[1] / codes.numel()
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (96, 500), (1, 9001)])
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: torch.randint(-128, 128, shape),
        lambda shape: torch.full(shape, -128),
        lambda shape: torch.full(shape, 127),
        lambda shape: (torch.rand(shape) > 0.999) * 5 - 2,
        lambda shape: torch.randn(shape) * 3,
    ],
)
def test_codes_come_back_exactly(shape, make):
    codes = make(shape).to(torch.int8)
    assert torch.equal(unpack(pack(codes), *shape), codes)
    assert torch.equal(pack(codes), pack(codes.clone())) and unpack(pack(codes), *shape).is_contiguous()


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0, 2.0, 8.0, 40.0])
def test_bytes_are_near_the_entropy(spread):
    codes = normal(spread)
    bits = 8 * len(pack(codes)) / codes.numel()
    assert entropy(codes) - 0.01 <= bits < 1.005 * entropy(codes) + 8 * 600 / codes.numel()
    assert size(codes) == pytest.approx(len(pack(codes)), abs=3 * 11)


def test_the_same_bytes_on_every_machine():
    codes = torch.arange(-60, 60).reshape(8, 15).remainder(7).sub(3).to(torch.int8)
    assert bytes(pack(codes).tolist()).hex() == PINNED


PINNED = (
    "fd061109110911099a0911091109110945e30100b36bc6a2110a77435737aa27029cf1"
    "196b0495feebb0832c3a521190b9c583b4c1682964144ce5c3bdb8"
)


def test_what_is_damaged_is_refused():
    codes = normal(2.0, (20, 30))
    packed = pack(codes)
    shares = packed.clone()
    shares[2] += 1
    swapped = packed.clone()
    swapped[-7] ^= 64
    noise = torch.randint(0, 256, (999,), dtype=torch.uint8)
    for wrong in (
        packed[:-2],
        packed[:-1],
        torch.cat([packed, packed]),
        packed[:0],
        packed[:1],
        shares,
        swapped,
        noise,
    ):
        with pytest.raises(InputError, match="do not hold 20x30 codes"):
            unpack(wrong, 20, 30)
    for rows, columns in ((20, 31), (0, 5), (2**20, 2**20)):
        with pytest.raises(InputError, match=f"do not hold {rows}x{columns}"):
            unpack(packed, rows, columns)
    with pytest.raises(InputError, match=r"expected torch\.uint8"):
        unpack(codes, 20, 30)
