"""One file of a data set to an image: no program is run, no device is read, and no bomb is decoded."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Sequence
from typing import Any

from vitlr.errors import InputError
from vitlr.runtime.words import one_line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # JPEG opens MPO; for EPS Pillow would run Ghostscript
_MAX_PIXELS = 178_956_970  # where Pillow itself refuses a decompression bomb; kept where a caller lifts that limit
_FEW_PIXELS = 2**24  # of any file; beyond, pixels are in proportion to its bytes
_PIXELS_A_BYTE = 20  # photographs have 2 to 10
_MAX_FILE = 2**29  # bytes
_NESTED = 3  # levels of archives within archives
_PADDING = 2**20  # zeros that may follow the last member; tar fills up to a block, of 10 KiB if not told otherwise
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")


def decode(reader: Any, index: int, mode: str, side: float) -> Any:
    """Image `index` of timm's reader in this mode; raises what Pillow raises, and ValueError for one too large.

    `side` is that of the model's crop, to which the image's short side will be scaled.
    """
    from PIL import Image

    size = size_of(reader, index)
    Image.init()  # a format is known once its module is loaded, and is loaded once
    with reader[index][0] as file, Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        long, short = max(width, height), max(min(width, height), 1)
        most = _MAX_PIXELS if size is None else min(max(_FEW_PIXELS, _PIXELS_A_BYTE * size), _MAX_PIXELS)
        # A one-pixel-high strip is small until its short side is scaled up to the model's.
        if max(width * height, side**2 * long / short) > most:
            raise ValueError(f"{width} x {height} pixels are too many")
        return eight_bits(image).convert(mode)


def eight_bits(image: Any) -> Any:
    """An image of numbers wider than a byte as one of bytes; Pillow would cut them off at 255 and leave it white.

    16 bits become 8 by dividing by 257. Whole numbers of 32 bits and fractions do not say what is white: by the
    largest, 1, 255 or 65535. Raises ValueError for what is none of these.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((w for w in whites if high <= w), 0.0)
    if not (low >= 0 and white):  # NaN compares false
        raise ValueError(f"its pixels are from {low:g} to {high:g}, expected 0 to 1, 255 or 65535")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def listing(reader: Any, indices: Sequence[int]) -> str:
    """Sixteen hex digits of the names and sizes of these images, or of what a Hub's data set says of itself."""
    sha = hashlib.sha256(str(getattr(getattr(reader, "dataset", None), "_fingerprint", "")).encode())
    for index in indices:
        try:
            size = size_of(reader, index)
        except (OSError, ValueError):  # to be skipped when it is read
            size = -1
        name = index if size is None else reader.filename(index)
        sha.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()[:16]


def size_of(reader: Any, index: int) -> int | None:
    """Bytes of a file or a member of an archive, None where the reader has neither; ValueError for what cannot be."""
    samples = getattr(reader, "samples", None)
    sample = None if samples is None else samples[index][0]
    if isinstance(sample, str):
        state = os.stat(sample)
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for a writer
            raise ValueError("it is no regular file")
        size = state.st_size
    elif isinstance(sample, tarfile.TarInfo):
        if sample.issparse():
            raise ValueError("it is a sparse member, whose size is no more than a claim")
        size = sample.size
    else:
        return None
    if not 0 <= size <= _MAX_FILE:
        raise ValueError(f"{size} bytes are too many")
    return size


def check_archive(path: str) -> None:
    """Raise `InputError` for a .tar that is no regular file, compressed (one image would unpack all), or cut short.

    Cut anywhere it is read as a shorter one without a word; a whole one ends in two blocks of zeros.
    """
    if not os.path.isfile(path):
        raise InputError(f"cannot read {path}: expected a folder of images, a .tar or hfds/NAME")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(max(file.seek(0, os.SEEK_END) - 2 * tarfile.BLOCKSIZE, 0))
            end = file.read(2 * tarfile.BLOCKSIZE)
    except OSError as cause:
        raise InputError(f"cannot read {path}: {cause.strerror or cause}") from cause
    if start.startswith(_COMPRESSED):
        raise InputError(f"cannot read images from {path}: it is compressed; unpack it to a plain .tar, or a folder")
    if end.strip(b"\0") or len(end) < 2 * tarfile.BLOCKSIZE:
        raise InputError(f"cannot read images from {path}: it is cut short, or no .tar; copy or make it again")
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as archive:
            _check_members(archive, os.path.getsize(path), _NESTED)
    except (tarfile.TarError, OSError, EOFError, ValueError) as cause:
        raise InputError(f"cannot read images from {path}: {one_line(cause, 120)}") from cause


class _Member(tarfile.TarInfo):
    """A member whose size is not below zero: a reader would go back to where it was, for ever."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a member has a size below zero")
        return super()._block(count)  # type: ignore[misc]


def _check_members(archive: tarfile.TarFile, end: int, levels: int) -> None:
    """Raise `tarfile.ReadError` where a member ends beyond the archive: read as a stream, it has no end."""
    for member in archive:
        if not 0 <= member.offset_data + (0 if member.issparse() else member.size) <= end:
            raise tarfile.ReadError(f"{member.name:.80} claims {member.size} bytes, the archive has {end}")
        if member.isfile() and member.name.lower().endswith(".tar"):
            if not levels:
                raise tarfile.ReadError("archives within archives are too deep")
            with archive.extractfile(member) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as inner:  # type: ignore[union-attr]
                _check_members(inner, member.size, levels - 1)
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(_PADDING + 1)
    if rest.strip(b"\0") or len(rest) > _PADDING:
        raise tarfile.ReadError(
            f"it ends at byte {archive.offset} of {end}, and more follows: damaged there, or two in one; make it again"
        )
