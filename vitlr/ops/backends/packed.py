"""Weights in the order in which the CPU kernels read them, kept for as long as the tensors they were made from.

A packed copy belongs to one tensor object and is freed with it. It is made again when that tensor is no longer what it
was: other memory, shape, dtype or content. The content is asked for by a hash over all of it, at the speed of memory,
since torch counts no write through `.data` or NumPy, nor any to an inference tensor.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from vitlr.ops.backends import native

FORMS = {"int8": 1, "int4": 2}  # 0 is a weight as it is


class Packed(NamedTuple):
    """A packed [N, K]: what the native part takes for it, and the memory behind that."""

    fields: tuple[int, int, int, int, int, int]  # pointer, pointer of the scales, N, K, group, form
    memory: tuple[Tensor, ...]


# id of the tensor -> (reference to it, its state, its packed copy)
_entries: dict[int, tuple[weakref.ref[Tensor], tuple, Packed]] = {}


def weight(W: Tensor, isa: str) -> Packed:
    """W [N, K], fp32 or bf16, packed for an instruction set."""
    state = (isa, *_state(W))
    return _kept(W, state) or _keep(W, state, _pack(W, isa))


def codes(R: Tensor, scale: Tensor, K: int, group: int, form: str, isa: str) -> Packed:
    """The residual [N, K] of codes R and scales [N, groups], packed for an instruction set."""
    state = (isa, group, form, *_state(R), *_state(scale))
    return _kept(R, state) or _keep(R, state, _pack_codes(R, scale, K, group, form, isa))


def int8(W: Tensor, isa: str) -> Packed:
    """Codes W [N, K] of a chain of integers, packed for an instruction set.

    Nothing trains codes, and a hash over them would be as long as the products of a few dozen rows: writes that torch
    counts are seen, and all others only where it counts none, in an inference tensor.
    """
    changes = native.fingerprint(W) if W.is_inference() else W._version
    state = ("int8", isa, changes, W.data_ptr(), W.shape, W.stride(), W.dtype)
    return _kept(W, state) or _keep(W, state, _pack_int8(W, isa))


def count() -> int:
    """How many packed copies are kept."""
    return len(_entries)


def _state(W: Tensor) -> tuple:
    return W.data_ptr(), W.shape, W.stride(), W.dtype, native.fingerprint(W)


def _kept(owner: Tensor, state: tuple) -> Packed | None:
    entry = _entries.get(id(owner))
    return entry[2] if entry is not None and entry[0]() is owner and entry[1] == state else None


def _keep(owner: Tensor, state: tuple, packed: Packed) -> Packed:
    key = id(owner)
    # The reference calls back before its id can be another tensor's. One that is replaced here never does.
    _entries[key] = (weakref.ref(owner, lambda _: _entries.pop(key, None)), state, packed)
    return packed


def _pack(W: Tensor, isa: str) -> Packed:
    panels = native.pack(W, isa)
    return Packed((panels.data_ptr(), 0, *W.shape, 1, 0), (panels,))


def _pack_int8(W: Tensor, isa: str) -> Packed:
    panels = native.int8_pack(W, isa)
    return Packed((panels.data_ptr(), 0, *W.shape, W.shape[1], FORMS["int8"]), (panels,))


def _pack_codes(R: Tensor, scale: Tensor, K: int, group: int, form: str, isa: str) -> Packed:
    panels, scales = native.pack_codes(R, scale, K, group, FORMS[form], isa)
    return Packed((panels.data_ptr(), scales.data_ptr(), scale.shape[0], K, group, FORMS[form]), (panels, scales))
