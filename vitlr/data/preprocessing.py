"""How images become the tensors that a model was trained on: said by the model, its file or processor, or given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vitlr.data.options import Preprocessing, numbers
from vitlr.data.processors import ASK, of_processor, says, sides
from vitlr.errors import InputError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import like, uncompiled, unwrapped

KEYS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_DEFAULTS = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}


def data_config(model: nn.Module, given: Any = None, **changes: Any) -> dict[str, Any]:
    """timm's words for a model's preprocessing: input_size `(C, H, W)`, mean, std, crop_pct, crop_mode, interpolation.

    `given` is a mapping of such words, a transformers image processor or a torchvision preset, `changes` some of
    `Preprocessing`. What they leave open is asked of the model: timm, its vitlr file, open_clip, the image processor
    beside transformers' weights. Raises `InputError` where mean, std or size stay unknown: no guess is made.
    """
    return described(model, given, **changes)[0]


def described(model: nn.Module, given: Any = None, **changes: Any) -> tuple[dict[str, Any], str]:
    """`data_config`, and in one line what was taken and from whom."""
    named = {**_given(given), **Preprocessing.of(**changes).words()}
    found = _described(model, needed=not {"input_size", "mean", "std"} <= named.keys())
    if missing := [key for key in ("input_size", "mean", "std") if key not in {**found, **named}]:
        raise InputError(f"nothing says with which {' and '.join(missing)} {_called(model)} was trained{ASK}")
    if named:
        found["source"] = f"{found['source']}; {', '.join(named)} as given" if "source" in found else "as given"
    if len(named.get("input_size", (0,) * 3)) == 2:
        named["input_size"] = (found.get("input_size", (3,))[0], *named["input_size"])
    source = found.pop("source", "as given")
    config = _whole({**_DEFAULTS, **found, **named})
    return config, f"{_said(config)} ({source})"


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """`(C, H, W)` of the images that a model takes. Raises `InputError` where nothing says it."""
    found = _described(model, needed=True)
    if "input_size" not in found:
        raise InputError(f"nothing says which size of images {_called(model)} takes; give input_size=(3, 224, 224)")
    channels, height, width = found["input_size"]
    return int(channels), int(height), int(width)


def _said(config: Mapping[str, Any]) -> str:
    size = "x".join(map(str, config["input_size"]))
    mean, std = (", ".join(f"{value:.4g}" for value in config[key]) for key in ("mean", "std"))
    return f"images as {size}, mean {mean}, std {std}, crop {config['crop_pct']:.4g}, {config['interpolation']}"


def _given(given: Any) -> dict[str, Any]:
    """The words of a mapping, of transformers' processors and of torchvision's presets."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        if unknown := [key for key in given if key not in KEYS]:
            raise InputError(f"data_config= has {unknown[0]!r}, expected some of {', '.join(KEYS)}")
        words = {key: value for key, value in given.items() if value is not None}
        for key in ("mean", "std"):
            if key in words:
                words[key] = numbers(key, words[key])
        if isinstance(words.get("input_size"), int):
            words["input_size"] = sides(words["input_size"])
        return words
    if says(given):
        return of_processor(given)
    if hasattr(given, "crop_size") and hasattr(given, "mean"):
        crop, resize = (int(values[0]) for values in (given.crop_size, given.resize_size))
        words = {"input_size": (len(given.mean), crop, crop), "mean": given.mean, "std": given.std}
        return {**words, "crop_pct": crop / resize, "interpolation": given.interpolation.value}
    raise InputError(
        f"data_config= is a {type(given).__name__}, expected a mapping such as {{'mean': ..., 'std': ...}}, a "
        "transformers image processor or the transforms of torchvision's weights"
    )


def _described(model: nn.Module, needed: bool) -> dict[str, Any]:
    """What the model itself, or the one inside it that gets the very same images, says of its preprocessing."""
    model = unwrapped(model)
    for name, module in model.named_modules():
        words = next((words for source in _SOURCES if (words := source(uncompiled(module))) is not None), None)
        if words is None:
            continue
        if name and not _passed_on(model, module, words.get("input_size")):
            if not needed:
                return {}
            raise InputError(
                f"{_called(model)} may change the images before {name} ({type(module).__name__}) gets them, so how to "
                f"make them is not known{ASK}"
            )
        return words
    return {}


def _called(model: nn.Module) -> str:
    return type(model).__qualname__


def _of_file(module: nn.Module) -> dict[str, Any] | None:
    """What the vitlr file says that a model was read from."""
    info = getattr(module, "vitlr_info", None)
    words = (info.get("data") if isinstance(info, Mapping) else None) or {}
    if not {"input_size", "mean", "std"} <= set(words):
        return None
    return {**{key: words[key] for key in KEYS if key in words}, "source": "as its file says"}


def _of_timm(module: nn.Module) -> dict[str, Any] | None:
    """timm describes the pretrained weights; a model made with another img_size or in_chans is asked itself."""
    cfg = getattr(module, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or "mean" not in cfg:
        return None
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = dict(resolve_model_data_config(module))
    args = (getattr(module, "vitlr_origin", None) or {}).get("args", {})
    patches = getattr(module, "patch_embed", None)
    size = getattr(patches, "img_size", None) or args.get("img_size") or config["input_size"][-2:]
    projection = getattr(patches, "proj", None)
    channels = args.get("in_chans") or getattr(projection, "in_channels", None) or config["input_size"][0]
    words = {key: config[key] for key in KEYS if key in config}
    return {**words, "input_size": (int(channels), *sides(size)), "source": "as timm says"}


def _of_open_clip(module: nn.Module) -> dict[str, Any] | None:
    """open_clip's towers keep mean and std of their training."""
    mean, std, size = (getattr(module, f"image_{word}", None) for word in ("mean", "std", "size"))
    if mean is None or std is None or size is None:
        return None
    return {"input_size": (len(mean), *sides(size)), "mean": mean, "std": std, "source": "as open_clip says"}


def _of_transformers(module: nn.Module) -> dict[str, Any] | None:
    """The image processor beside the weights; the config alone knows size and channels, but neither mean nor std.

    The defaults of the processor that transformers names for a kind of model are not those of its weights: for Swin
    and DINOv2 they differ.
    """
    config = getattr(module, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in (None, "timm_wrapper") or not hasattr(config, "to_dict"):  # the model of timm inside speaks for itself
        return None
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", None)
    words = _beside(getattr(config, "_name_or_path", ""))
    if isinstance(size, (int, list, tuple)):
        words["input_size"] = (words.get("input_size", (3,))[0], *sides(size))
    if isinstance(channels, int) and "input_size" in words:
        words["input_size"] = (channels, *words["input_size"][1:])
    return {"source": "as transformers' config says", **words}


_SOURCES = (_of_timm, _of_file, _of_open_clip, _of_transformers)


def _beside(place: str) -> dict[str, Any]:
    """What the image processor of a folder, or of a name that was downloaded, says; {} without one. Never the net."""
    if not place:
        return {}
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(place, local_files_only=True)
    except Exception:  # no such file, none for images, one that needs a package: then it says nothing
        return {}
    if not says(processor):
        return {}
    return {**of_processor(processor), "source": f"as the image processor of {place} says"}


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """The words in their types, mean and std for as many channels as there are."""
    sizes = config["input_size"] = tuple(int(v) for v in config["input_size"])
    for key in ("mean", "std"):
        values = numbers(key, config[key]) or ()
        config[key] = values if len(values) == sizes[0] else (sum(values) / len(values),) * sizes[0]
    return config


class _Reached(Exception):
    """The module that was asked about has been called."""


def _passed_on(model: nn.Module, inner: nn.Module, size: tuple[int, ...] | None) -> bool:
    """Whether `inner` gets the very image that `model` is given: run as far as that."""
    if size is None:
        return False
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(like(model))
    seen: list[Any] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend([*args, *kwargs.values()])
        raise _Reached

    handle = inner.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with evaluation_mode(model), torch.no_grad():
            model(image)
    except _Reached:
        pass
    except Exception:  # whatever a forward raises on an image it cannot take: then nothing is known
        return False
    finally:
        handle.remove()
    return any(isinstance(t, torch.Tensor) and t.shape == image.shape and torch.equal(t, image) for t in seen)
