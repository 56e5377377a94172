"""Codes as bytes: read back exactly, near their entropy, and never beyond what was asked for."""

from __future__ import annotations

import zlib

import pytest
import torch

from vitlr.errors import InputError
from vitlr.runtime.coding import pack, unpack


def normal(spread: float, shape: tuple[int, int] = (96, 500)) -> torch.Tensor:
    return (torch.randn(shape) * spread).round().clamp(-127, 127).to(torch.int8)


def entropy(codes: torch.Tensor) -> float:
    share = codes.flatten().unique(return_counts=True)[1] / codes.numel()
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (96, 500)])
def test_codes_come_back_exactly(shape):
    codes = torch.randint(-127, 128, shape).to(torch.int8)
    assert torch.equal(unpack(pack(codes), *shape), codes)
    assert torch.equal(pack(codes), pack(codes.clone())) and unpack(pack(codes), *shape).is_contiguous()


@pytest.mark.parametrize(("spread", "more"), [(1.0, 0.06), (2.0, 0.02), (8.0, 0.01)])
def test_bytes_are_near_the_entropy(spread, more):
    codes = normal(spread)
    assert entropy(codes) <= 8 * len(pack(codes)) / codes.numel() < (1 + more) * entropy(codes) + 0.02


def test_what_is_damaged_is_refused():
    codes = normal(2.0, (20, 30))
    packed = pack(codes)
    for wrong in (
        packed[:-2],
        torch.cat([packed, packed]),
        packed[:0],
        torch.randint(0, 256, (99,), dtype=torch.uint8),
    ):
        with pytest.raises(InputError, match="packed codes"):
            unpack(wrong, 20, 30)
    with pytest.raises(InputError, match="do not hold 20x31"):
        unpack(packed, 20, 31)
    with pytest.raises(InputError, match=r"expected torch\.uint8"):
        unpack(codes, 20, 30)


def test_a_bomb_is_not_unpacked():
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = coder.compress(bytes(50_000_000)) + coder.flush()
    with pytest.raises(InputError, match="do not hold 4x4"):
        unpack(torch.frombuffer(bytearray(bomb), dtype=torch.uint8), 4, 4)
