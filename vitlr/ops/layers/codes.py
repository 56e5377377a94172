"""How a compact residual R [N, K] is stored: codes, and one scale for every group of columns of a row.

    form       codes                                 R[n, k]
    int8       int8 [N, K], -127 .. 127              codes[n, k] · scale[n, k // group]
    int4       uint8 [N, ⌈K/2⌉], two to a byte       (nibble - 8) · scale[n, k // group]
    fp8        uint8 [N, K], the bits of e4m3fn      value(codes[n, k]) · scale[n, k // group]
    blockdiag  floats [nb, N/nb, K/nb]               codes[b, n mod N/nb, k mod K/nb] inside block b, else 0

int4: the low nibble is the even column, the high one the odd column; a nibble holds the code plus 8, so that both
halves come out by a mask, a shift and one subtraction; -7 .. 7 are used. The last high nibble of an odd K is 8, a zero.
fp8: bits as uint8, because autocast and `.to(dtype)` would convert a tensor that is floating point.
scale [N, ⌈K/group⌉] has the dtype of x: autocast and `.to(dtype)` treat it like any weight, and it is half as large as
in fp32. The codes are found with the scale as it was rounded, so that its rounding costs nothing.
blockdiag has no scale; its `group_size` is the number of columns of a block, K/nb.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {"int8": 127, "int4": 7, "fp8": 448}
"""The forms that are quantised, with the largest value that a code stands for."""
FORMS = (*LARGEST, "blockdiag")
ZERO = {"int4": 0x88}
"""What an element of the codes holds where R is zero; 0 in the other forms."""
FP8 = torch.float8_e4m3fn
_OFFSET = 8


def groups(K: int, group_size: int) -> int:
    """Number of groups of a row, or of blocks; the last group may be ragged."""
    return -(-K // group_size)


def code_shape(form: str, N: int, K: int, group_size: int) -> tuple[int, ...]:
    """The shape of the codes of R [N, K]."""
    if form == "blockdiag":
        return groups(K, group_size), N // groups(K, group_size), group_size
    return N, -(-K // 2) if form == "int4" else K


def code_dtype(form: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the codes beside an x of `dtype`."""
    return {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.uint8}.get(form, dtype)


def pack_int4(values: Tensor) -> Tensor:
    """Integers -8 .. 7 [N, K] to bytes [N, ⌈K/2⌉]; `unpack_int4` undoes it exactly."""
    nibbles = (values + _OFFSET).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=_OFFSET)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_int4(codes: Tensor, K: int) -> Tensor:
    """Bytes [N, ⌈K/2⌉] to integers -8 .. 7 [N, K], int8."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :K]
    return nibbles.to(torch.int8) - _OFFSET


def rounded(values: Tensor, form: str) -> Tensor:
    """Values in units of their scale as the nearest codes hold them: to nearest even, clamped to the largest code."""
    values = values.clamp(-LARGEST[form], LARGEST[form])
    return values.float().to(FP8).to(values.dtype) if form == "fp8" else values.round()


def encode(values: Tensor, form: str) -> Tensor:
    """The codes of values [N, K] in units of their scale, rounded as `rounded` does."""
    if form == "fp8":
        return rounded(values, form).to(FP8).view(torch.uint8)
    codes = rounded(values, form).to(torch.int8)
    return pack_int4(codes) if form == "int4" else codes


def decode(codes: Tensor, form: str, K: int, dtype: torch.dtype) -> Tensor:
    """The values [N, K] of codes, in units of their scale; exact in every floating dtype from bf16 up."""
    if form == "fp8":
        return codes.view(FP8).to(dtype)
    return (unpack_int4(codes, K) if form == "int4" else codes).to(dtype)


def spread(scale: Tensor, group_size: int, K: int) -> Tensor:
    """Scales [N, groups] repeated over their columns, [N, K]."""
    width = min(group_size, K)
    return scale.unsqueeze(-1).expand(*scale.shape, width).flatten(1)[:, :K]


def dequantise(codes: Tensor, scale: Tensor | None, form: str, group_size: int, K: int) -> Tensor:
    """The dense R [N, K] of what is stored, in the dtype of the scale (blockdiag: of the codes)."""
    if form == "blockdiag":
        blocks, rows, columns = codes.shape
        # In place of torch.block_diag, which takes a list and so one graph node a block.
        eye = torch.eye(blocks, dtype=codes.dtype, device=codes.device)
        return (codes.unsqueeze(2) * eye[:, None, :, None]).reshape(blocks * rows, blocks * columns)
    assert scale is not None
    return decode(codes, form, K, scale.dtype) * spread(scale, group_size, K)
