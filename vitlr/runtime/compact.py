"""Tensors in as few bytes as give them back to the last bit: what was rounded is stored by what it was rounded to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.runtime.coding import pack, unpack

HALF, NEAR, CODES, EXPONENT = "half", "near", "codes", "exponent"  # after a "|" in the names of a file's tensors
STEPS = 8  # of an exponent in a factor of two
_LEAST = 4096  # entries of a matrix that this is worth it for
BITS = (7, 6, 5, 4, 3)  # of a matrix's codes; 7 for all of them cost 0.0006 nats on a ViT-Ti (docs/method.md)
_NEAR = 127


def rounded(value: Tensor, bits: int = BITS[0]) -> Tensor:
    """float32 to what few bytes hold: matrices to so many bits a row, `q · 2^(e / 8)`, all else to float16.

    What is of another dtype, or beyond float16, stays as it is.
    """
    if value.dtype != torch.float32 or not torch.isfinite(value).all():
        return value
    if is_matrix(value):
        return value if _found_rows(value) else _from_rows(*_by_rows(value, _top(bits)), value.shape)
    half = value.half()
    return half.float() if torch.isfinite(half).all() else value


def stored(value: Tensor) -> dict[str, Tensor]:
    """What a file holds of a tensor, by what its name ends in: codes, float16, or the tensor itself, never less.

    Numbers in int16 within 8 bits of each other are stored by how far they are from their middle, which goes first.
    """
    value = value.detach().cpu()
    if value.dtype == torch.int8 and value.ndim == 2 and value.numel():
        return {f"|{CODES}": pack(value)}
    if value.dtype == torch.int16 and value.ndim == 1 and len(value):
        middle = (value.amin() + value.amax()) // 2
        if int((value - middle).abs().max()) <= _NEAR:
            return {f"|{NEAR}": torch.cat([middle.view(1).view(torch.int8), (value - middle).to(torch.int8)])}
    if value.dtype == torch.float32:
        half = value.half()
        if torch.equal(half.float(), value):
            return {f"|{HALF}": half}
        if torch.isfinite(value).all() and is_matrix(value):
            found = _found_rows(value)
            if found is not None:
                return {f"|{CODES}": pack(found[0]), f"|{EXPONENT}": found[1]}
    return {"": value}


def restored(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of which a file holds these parts; `shapes` are those of the model.

    Raises `InputError` for parts that make no tensor of the shape; no more memory is taken than that asks for.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, form = key.partition("|")
        parts.setdefault(name, {})[form] = tensor
    return {name: _restored(name, found, shapes.get(name)) for name, found in parts.items()}


def shapes(parts: Mapping[str, tuple[int, ...]], whole: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of the tensors that parts of these shapes make; codes make what `whole` says, or are refused later."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in parts.items():
        name, _, form = key.partition("|")
        if form in ("", HALF):
            found[name] = shape
        elif form == NEAR:
            found[name] = (shape[0] - 2,) if len(shape) == 1 else shape
        elif form == CODES:
            found[name] = whole.get(name, ())
    return found


def _restored(name: str, found: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> Tensor:
    if set(found) == {""}:
        return found[""]
    if shape is None:
        raise InputError(f"tensor {name:.120}: the model has no such tensor")
    if set(found) == {HALF} and found[HALF].dtype == torch.float16:
        return found[HALF].float()
    if set(found) == {NEAR} and found[NEAR].dtype == torch.int8 and found[NEAR].ndim == 1 and len(found[NEAR]) > 2:
        return found[NEAR][2:].to(torch.int16) + found[NEAR][:2].clone().view(torch.int16)
    if CODES not in found or len(shape) < 2:
        raise InputError(f"tensor {name:.120}: the file holds no form of it that is known")
    rows = _rows(shape) if len(found) > 1 else (shape[0], math.prod(shape[1:]))
    try:
        codes = unpack(found[CODES], *rows)
    except InputError as cause:
        raise InputError(f"tensor {name:.120}: {cause}") from cause
    if set(found) == {CODES}:
        return codes
    exponent = found.get(EXPONENT)
    if set(found) != {CODES, EXPONENT} or exponent is None:
        raise InputError(f"tensor {name:.120}: the file holds no form of it that is known")
    fits = exponent.dtype == torch.int16 and exponent.shape == rows[:1]
    if not fits or int(exponent.int().abs().max()) > 1000:
        raise InputError(f"tensor {name:.120}: its exponents are damaged; get the file again")
    return _from_rows(codes, exponent, shape)


def is_coded(value: Tensor) -> bool:
    """Whether `rounded` makes codes of it."""
    return value.dtype == torch.float32 and is_matrix(value) and bool(torch.isfinite(value).all())


def is_matrix(value: Tensor) -> bool:
    return value.ndim > 1 and value.numel() >= _LEAST and value.numel() > 16 * _rows(tuple(value.shape))[0]


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a weight, its outputs; of a table `[1, tokens, channels]`, its channels, of which some are large."""
    rows = shape[0] if shape[0] > 1 else shape[-1]
    return rows, math.prod(shape) // max(rows, 1)


def by_row(value: Tensor) -> Tensor:
    """A matrix as the rows that share an exponent."""
    return value.reshape(len(value), -1) if len(value) > 1 else value.reshape(-1, value.shape[-1]).mT


def _by_rows(value: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes `[rows, columns]` and the least exponents that keep them within ±top."""
    rows = by_row(value).double()
    largest = rows.abs().amax(1).clamp_min(2.0**-110)
    exponent = (STEPS * (largest / top).log2()).ceil().to(torch.int16)
    return _codes(rows, exponent, top), exponent


def _found_rows(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and exponents of what `rounded` gave, of the fewest bits that give it; None of all else.

    The least exponent may be one off where the largest code is the top (by float32) or next to it (rounded).
    """
    rows = by_row(value)
    for top in map(_top, reversed(BITS)):
        _, least = _by_rows(value, top)
        exponent, exact = least.clone(), torch.zeros_like(least, dtype=torch.bool)
        for off in (0, -1, 1):
            tried = _codes(rows, least + off, top) * power(least + off)[:, None]
            same = (tried == rows).all(1) & ~exact
            exponent[same] = least[same] + off
            exact |= same
        if exact.all():
            return _codes(rows, exponent, top), exponent
    return None


def _codes(rows: Tensor, exponent: Tensor, top: int) -> Tensor:
    return (rows / power(exponent).double()[:, None]).round().clamp(-top, top).to(torch.int8)


def _top(bits: int) -> int:
    """The largest code of so many bits."""
    return 2 ** (bits - 1) - 1


def _from_rows(codes: Tensor, exponent: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows = codes * power(exponent)[:, None]
    return rows.reshape(shape) if shape[0] > 1 else rows.mT.reshape(shape)


def power(exponent: Tensor) -> Tensor:
    """`2^(e / 8)` in float32 of integers e."""
    # Powers of two are exact, and the eighths are eight constants: the same on every machine.
    eighths = torch.exp2(torch.arange(STEPS, dtype=torch.float64) / STEPS).float().to(exponent.device)
    exponent = exponent.to(torch.int32)
    return torch.ldexp(eighths[exponent % STEPS], exponent.div(STEPS, rounding_mode="floor"))
