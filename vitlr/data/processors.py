"""What an image processor of transformers does to an image, in timm's words; refused where they have none for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlr.errors import InputError

ASK = "; give mean=, std= and img_size= (crop_pct=, interpolation=), or data_config="


def says(processor: Any) -> bool:
    """Whether a value is an image processor that says how images are made."""
    return (
        getattr(processor, "image_mean", None) is not None or hasattr(processor, "rescale_factor") or _timms(processor)
    )


def _timms(processor: Any) -> bool:
    return isinstance(getattr(processor, "data_config", None), Mapping)


def of_processor(processor: Any) -> dict[str, Any]:
    """`input_size`, mean, std, `crop_pct`, `crop_mode` and interpolation of a transformers image processor.

    Raises `InputError` for one that does not say to which size it brings images, cuts out more than there is, or
    swaps channels: timm's transform does neither.
    """
    if _timms(processor):  # transformers' own for a model of timm
        return {key: processor.data_config[key] for key in _TIMM if key in processor.data_config}
    called = type(processor).__name__
    if getattr(processor, "do_flip_channel_order", False):
        raise InputError(f"{called} swaps red and blue, which timm's transform does not{ASK}")
    size, crop = (_edges(getattr(processor, name, None)) for name in ("size", "crop_size"))
    crops = bool(getattr(processor, "do_center_crop", False)) and crop is not None
    target = crop if crops else size
    if target is None:
        raise InputError(f"{called} does not say to which size it brings images{ASK}")
    shorter = _entry(getattr(processor, "size", None), "shortest_edge") is not None
    if shorter and size and called.startswith("Levit"):
        size = tuple(int(256 / 224 * edge) for edge in size)  # type: ignore[assignment]
    if crops and size and min(target) > min(size):
        raise InputError(f"{called} cuts {target} out of images of {size}, which timm's transform does not{ASK}")
    mean, std = _shift(processor)
    words: dict[str, Any] = {"input_size": (len(mean), *target), "mean": mean, "std": std}
    share = getattr(processor, "crop_pct", None)  # ConvNeXt's, for sizes below 384
    share = share if share and min(target) < 384 else None
    words["crop_pct"] = share or (min(target) / min(size) if crops and size else 1.0)
    words["crop_mode"] = "center" if shorter and (share or crops) else "squash"
    resample = getattr(processor, "resample", None)
    words["interpolation"] = "bicubic" if resample is None else _FILTERS.get(int(resample), "bicubic")
    return words


_TIMM = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # as Pillow numbers them


def _shift(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels from 0 to 1 that do what the processor does to bytes.

    It makes `y = f b − o` of bytes b, f its factor and o 1 where it shifts, and `(y − m) / s` of that; for `b / 255`
    that is the mean `(m + o) / 255 f` and the std `s / 255 f`.
    """
    rescales = getattr(processor, "do_rescale", True) is not False
    factor = float(getattr(processor, "rescale_factor", None) or 1 / 255) if rescales else 1.0
    shifts = rescales and any(getattr(processor, name, False) for name in ("rescale_offset", "offset"))
    offset = 1.0 if shifts else 0.0
    mean, std = (getattr(processor, f"image_{word}", None) for word in ("mean", "std"))
    if getattr(processor, "do_normalize", True) is False or mean is None or std is None:
        mean, std = 0.0, 1.0
    mean, std = _channels(mean), _channels(std)
    if getattr(processor, "include_top", False):  # EfficientNet's: divided by it once more
        std = tuple(value * value for value in std)
    scale = 255 * factor
    if abs(scale - 1) < 1e-6 and not offset:
        return mean, std
    return tuple((value + offset) / scale for value in mean), tuple(value / scale for value in std)


def _channels(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, (int, float)) else tuple(float(v) for v in value)


def _edges(size: Any) -> tuple[int, int] | None:
    """Height and width of what a processor calls a size."""
    if isinstance(size, int):
        return size, size
    edge = _entry(size, "shortest_edge")
    height, width = _entry(size, "height") or edge, _entry(size, "width") or edge
    return None if height is None or width is None else (int(height), int(width))


def _entry(size: Any, key: str) -> Any:
    return size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)


def sides(size: Any) -> tuple[int, int]:
    """Height and width of a size, which may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return int(height), int(width)
