"""Integers worth few bits as bytes of a file: at their entropy, read back exactly and never beyond their size.

Asymmetric numeral systems (Duda, arXiv 1311.2540): a state x takes a symbol of share f / 2^14 in by
`x ← (x // f) 2^14 + x mod f + c`, c the shares of the symbols before it, and grows by its information; whole 16-bit
words leave it on the way. Several states take turns, so that each step is one of whole arrays.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitlr.errors import InputError

_BITS = 14  # of a share
_WORD = 16
_LEAST = np.uint64(1 << _WORD)  # of a state between steps, which lies below 2^32
_TURNS = 4096  # symbols that a state takes, about
_LINE = 2**31  # symbols; a file that claims more is refused

Words = NDArray[np.uint64]


def pack(codes: Tensor) -> Tensor:
    """int8 codes `[N, K]` as uint8 `[n]`: their least, their number, their shares, the states, the words.

    The bytes are the codes' entropy and about 100 more, 0.2 % above what they are worth. The same codes give the same
    bytes on every machine.
    """
    line = np.ascontiguousarray(codes.detach().cpu().numpy()).reshape(-1)
    least, counts = _counts(line)
    shares = _shares(counts)
    lanes = _lanes(len(line))
    table = bytes([least % 256, len(shares) - 1]) + shares.astype("<u2").tobytes()
    turns = np.full(-(-len(line) // lanes) * lanes, least + int(counts.argmax()), dtype=np.int16)
    turns[: len(line)] = line
    symbols = (turns - least).reshape(-1, lanes)
    f, c = shares.astype(np.uint64), _before(shares)
    full = f << np.uint64(2 * _WORD - _BITS)
    x, words = np.full(lanes, _LEAST), []
    for symbol in symbols[::-1]:
        out = x >= full[symbol]
        words.append((x[out] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(out, x >> np.uint64(_WORD), x)
        whole, part = np.divmod(x, f[symbol])
        x = (whole << np.uint64(_BITS)) + part + c[symbol]
    body = b"".join(word.tobytes() for word in reversed(words))
    return torch.frombuffer(bytearray(table + x.astype("<u4").tobytes() + body), dtype=torch.uint8)


def size(codes: Tensor) -> float:
    """Bytes of `pack(codes)`, to a few, without packing them."""
    line = codes.detach().cpu().numpy().reshape(-1)
    _, counts = _counts(line)
    shares = _shares(counts)
    bits = float(counts @ (_BITS - np.log2(np.maximum(shares, 1))))
    return 2 + 2 * len(shares) + 2 * _lanes(len(line)) + bits / 8


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The int8 codes `[rows, columns]` that `pack` packed.

    Raises `InputError` for bytes that are no such codes, or of another number of them; no more than that is unpacked.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise InputError(f"packed codes are {packed.dtype} {list(packed.shape)}, expected torch.uint8 bytes in a row")
    wrong = InputError(f"packed codes do not hold {rows}x{columns} codes; the file is damaged, get it again")
    data, count, lanes = packed.cpu().numpy().tobytes(), rows * columns, _lanes(rows * columns)
    names = 2 + 2 * (data[1] + 1) if len(data) > 1 else 0
    if not 0 < count < _LINE or not names or len(data) < names + 4 * lanes or (len(data) - names) % 2:
        raise wrong
    least, shares = int(np.int8(np.uint8(data[0]))), np.frombuffer(data[2:names], "<u2").astype(np.int64)
    if shares.sum() != 1 << _BITS or least + len(shares) - 1 > 127:
        raise wrong
    f, c = shares.astype(np.uint64), _before(shares)
    symbol_at = np.repeat(np.arange(len(shares), dtype=np.int64), shares)
    x = np.frombuffer(data[names : names + 4 * lanes], "<u4").astype(np.uint64)
    words, read = np.frombuffer(data[names + 4 * lanes :], "<u2").astype(np.uint64), 0
    found = np.empty((-(-count // lanes), lanes), dtype=np.int8)
    for turn in found:
        place = x & np.uint64((1 << _BITS) - 1)
        symbol = symbol_at[place.astype(np.int64)]
        turn[:] = symbol + least
        x = f[symbol] * (x >> np.uint64(_BITS)) + place - c[symbol]
        thin = x < _LEAST
        more = int(thin.sum())
        if read + more > len(words):
            raise wrong
        x[thin] = (x[thin] << np.uint64(_WORD)) | words[read : read + more]
        read += more
    if read != len(words) or (x != _LEAST).any():
        raise wrong
    return torch.from_numpy(found.reshape(-1)[:count].reshape(rows, columns))


def _lanes(count: int) -> int:
    """How many states take turns."""
    return max(1, count // _TURNS)


def _counts(line: NDArray[np.int8]) -> tuple[int, NDArray[np.int64]]:
    """The least symbol, and how often it and each above it up to the largest comes."""
    counts = np.bincount(line.view(np.uint8) ^ 0x80, minlength=256)  # −128 … 127 as 0 … 255
    there = counts.nonzero()[0]
    return int(there[0]) - 128, counts[there[0] : there[-1] + 1]


def _shares(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """In 2^-14, none of a symbol that comes less than once of them: what is over or missing is the commonest's."""
    shares = np.maximum((counts << _BITS) // counts.sum(), counts > 0)
    shares[counts.argmax()] += (1 << _BITS) - shares.sum()
    return shares


def _before(shares: NDArray[np.int64]) -> Words:
    """The shares of all symbols before each."""
    return (shares.cumsum() - shares).astype(np.uint64)
