"""Integers worth few bits as bytes of a file: Huffman codes of zlib, read back exactly and never beyond their size."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from vitlr.errors import InputError

_RAW = -zlib.MAX_WBITS  # no header, no checksum: the file that holds the bytes has its own


def pack(codes: Tensor) -> Tensor:
    """int8 codes `[N, K]` as uint8 `[n]`: column by column, so that neighbours are spread alike; Huffman codes only.

    What is spread like a normal distribution repeats nothing, so a search for repetitions finds none. The bytes are
    6 % more than the codes' entropy at 2 bits a code, 2 % at 3: a Huffman code is whole bits. The same codes give the
    same bytes.
    """
    columns = np.ascontiguousarray(codes.detach().cpu().numpy().T)
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(columns.tobytes()) + coder.flush()
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The int8 codes `[rows, columns]` that `pack` packed.

    Raises `InputError` for bytes that are no such codes, or of another number of them; no more than that is unpacked.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise InputError(f"packed codes are {packed.dtype} {list(packed.shape)}, expected torch.uint8 bytes in a row")
    coder, size = zlib.decompressobj(_RAW), rows * columns
    try:
        found = coder.decompress(packed.cpu().numpy().tobytes(), size + 1)
    except zlib.error as cause:
        raise InputError(f"packed codes are damaged ({cause}); get the file again") from cause
    if len(found) != size or not coder.eof or coder.unused_data:
        raise InputError(f"packed codes do not hold {rows}x{columns} codes; the file is damaged, get it again")
    return torch.frombuffer(bytearray(found), dtype=torch.int8).view(columns, rows).mT.contiguous()
