"""Tensors in a temporary file: memory to whoever uses them, and none that is needed while they are put away."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref

import torch
from torch import Tensor

from vitlr.errors import InputError

_areas: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address; tensors keep them


class Mapped:
    """A file without a name in a folder, gone with the last tensor in it."""

    def __init__(self, folder: str) -> None:
        self.folder, self._end = folder, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open while anything is added to it)
        except OSError as cause:
            raise InputError(f"cannot write into {folder!r}: {cause.strerror}; name a folder on a disk") from cause

    def zeros(self, entries: int) -> Tensor:
        """`[entries]` zeros in float64; `InputError` where the disk has no room for them."""
        size = 8 * entries
        try:
            os.posix_fallocate(self._file.fileno(), self._end, size)  # now: later, a full disk would kill the process
        except OSError as cause:
            raise InputError(
                f"{self.folder!r} has no room for {size:,} bytes after {self._end:,} ({cause.strerror}); "
                "name a folder on another disk"
            ) from cause
        area = mmap.mmap(self._file.fileno(), size, offset=self._end)
        self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        tensor = torch.frombuffer(area, dtype=torch.float64)
        _areas[tensor.data_ptr()] = area
        return tensor


def put_away(tensor: Tensor) -> None:
    """Take a tensor of such a file out of this process's memory until it is used; any other stays as it is."""
    area = _areas.get(tensor.data_ptr())
    if area is not None and sys.platform == "linux":  # elsewhere this advice may lose what was written
        area.madvise(mmap.MADV_DONTNEED)
