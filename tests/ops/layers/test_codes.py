"""How a compact residual is stored: layouts and exact round trips."""

from __future__ import annotations

import pytest
import torch

from vitlr.ops.layers.codes import (
    FP8,
    LARGEST,
    code_dtype,
    code_shape,
    decode,
    dequantise,
    encode,
    groups,
    pack_int4,
    spread,
    unpack_int4,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("K", [1, 2, 15, 16])
def test_nibbles_round_trip(K):
    values = torch.randint(-8, 8, (5, K), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (5, -(-K // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, K), values)


def test_every_byte_round_trips():
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(pack_int4(unpack_int4(packed, 32)), packed)


def test_layout_of_nibbles():
    packed = pack_int4(torch.tensor([[-7, 7, 3]], dtype=torch.int8))
    assert packed.tolist() == [[0x1 | 0xF << 4, 0xB | 0x8 << 4]]  # even columns low, odd high, a zero to fill up


@pytest.mark.parametrize("form", LARGEST)
def test_every_code_is_exact_in_every_float(form):
    if form == "fp8":
        codes = torch.tensor([[c for c in range(256) if c & 127 != 127]], dtype=torch.uint8)  # the rest are NaN
    else:
        codes = encode(torch.arange(-LARGEST[form], LARGEST[form] + 1)[None].float(), form)
    K = 2 * LARGEST[form] + 1 if form != "fp8" else 254
    exact = decode(codes, form, K, torch.float64)
    for dtype in FLOATS:
        values = decode(codes, form, K, dtype)
        assert values.dtype == dtype and torch.equal(values.double(), exact)
        assert torch.equal(encode(values, form), codes)
    assert exact.abs().max() == LARGEST[form]


@pytest.mark.parametrize("form", LARGEST)
def test_what_is_too_large_is_clamped(form):
    values = torch.tensor([[1e6, -1e6]])
    assert decode(encode(values, form), form, 2, torch.float32).tolist() == [[LARGEST[form], -LARGEST[form]]]


def test_fp8_bits_are_those_of_torch():
    values = torch.randn(4, 9) * 50
    assert torch.equal(encode(values, "fp8").view(FP8).float(), values.to(FP8).float())


@pytest.mark.parametrize(("form", "bits"), [("int8", 8), ("int4", 4), ("fp8", 8)])
@pytest.mark.parametrize(("K", "group"), [(24, 8), (23, 8), (5, 64)])
def test_shapes_and_values(form, bits, K, group):
    N = 6
    scale = torch.rand(N, groups(K, group)) + 0.1
    W = torch.randn(N, K)
    codes = encode(W / spread(scale, group, K), form)
    assert codes.shape == code_shape(form, N, K, group) and codes.dtype == code_dtype(form, torch.float32)
    assert codes.nbytes == N * -(-K * bits // 8)
    R = dequantise(codes, scale, form, group, K)
    values = decode(codes, form, K, torch.float32)
    for n in range(N):
        for k in range(K):
            assert R[n, k] == values[n, k] * scale[n, k // group]


def test_blocks_lie_on_the_diagonal():
    codes = torch.randn(3, 4, 2)
    assert codes.shape == code_shape("blockdiag", 12, 6, 2)
    assert torch.equal(dequantise(codes, None, "blockdiag", 2, 6), torch.block_diag(*codes))
