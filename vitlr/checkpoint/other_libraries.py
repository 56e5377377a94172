"""Models of transformers, torchvision and open_clip from a name and plain arguments: found out, checked, built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from vitlr.checkpoint import open_clip_towers
from vitlr.checkpoint.plain_args import Args, plain
from vitlr.checkpoint.structure import structure
from vitlr.errors import InputError
from vitlr.runtime.words import one_line

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,79}")
_ATTENTION = "attn_implementation"
_SAID_ELSEWHERE = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "model_type",
        "id2label",
        "label2id",
        "return_dict",
    }
)


class Library(NamedTuple):
    """How models of one library are told by name and arguments."""

    find: Callable[[nn.Module], tuple[str, Args] | None]
    """Name and arguments of a model; None of one that they cannot tell."""
    check: Callable[[str, Mapping[str, Any]], Args]
    """The arguments, if they and the name are known and plain. Raises `InputError`."""
    build: Callable[[str, Args], nn.Module]


def _class_of_transformers(name: str) -> Any:
    """The vision model of that name. Raises `InputError` for anything else that transformers has."""
    try:
        import transformers
    except ImportError as cause:
        raise InputError(
            f"{name} is a model of transformers, which is not installed: pip install transformers"
        ) from cause
    found: Any = getattr(transformers, name, None) if _NAME.fullmatch(name) else None
    vision = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not vision or getattr(found, "main_input_name", "") != "pixel_values" or found.config_class is None:
        raise InputError(f"{name[:80]!r} is not a model of images that transformers {transformers.__version__} knows")
    return found


def _find_in_transformers(model: nn.Module) -> tuple[str, Args] | None:
    cls = type(model)
    config: Any = getattr(model, "config", None)
    if not cls.__module__.startswith("transformers.models.") or not hasattr(config, "to_diff_dict"):
        return None
    told = config.to_diff_dict()
    args = _own(told)
    if told.get("id2label") is not None:
        args["id2label"] = {str(key): str(value) for key, value in told["id2label"].items()}
    args[_ATTENTION] = getattr(config, "_attn_implementation", None)
    try:
        return cls.__name__, _check_transformers(cls.__name__, args)
    except InputError:
        return None


def _own(told: Mapping[str, Any]) -> Args:
    """What of a configuration says how its model is built, and of those within it."""
    own = {key: of for key, of in told.items() if key not in _SAID_ELSEWHERE and not key.startswith("_")}
    return {key: _own(of) if isinstance(of, Mapping) else of for key, of in own.items()}


def _check_transformers(name: str, args: Mapping[str, Any]) -> Args:
    _class_of_transformers(name)
    args = dict(args)
    labels, attention = args.pop("id2label", None), args.pop(_ATTENTION, None)
    if attention not in (None, "eager", "sdpa"):
        raise InputError(f"{_ATTENTION}={str(attention)[:80]!r}, expected eager or sdpa")
    checked: Args = plain("configuration", args)
    if labels is not None:
        whole = isinstance(labels, Mapping) and len(labels) <= 100_000
        if not whole or not all(str(k).isdecimal() and isinstance(v, str) and len(v) <= 400 for k, v in labels.items()):
            raise InputError("id2label is not a table of numbers and names")
        checked["id2label"] = dict(labels)
    return {**checked, _ATTENTION: attention}


def _build_of_transformers(name: str, args: Args) -> nn.Module:
    cls, args = _class_of_transformers(name), dict(args)
    attention = args.pop(_ATTENTION, None)
    config = cls.config_class.from_dict(args)
    if attention is not None:
        config._attn_implementation = attention
    return cls(config)


# Classifiers of torchvision that have linears: their class, and how the names begin that they are registered under.
_FAMILIES = {"SwinTransformer": "swin_", "ConvNeXt": "convnext_", "MaxVit": "maxvit_"}
_VIT = "VisionTransformer"
_VIT_ARGS = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "dropout", "attention_dropout")


def _find_in_torchvision(model: nn.Module) -> tuple[str, Args] | None:
    cls = type(model)
    if not cls.__module__.startswith("torchvision.models."):
        return None
    if cls.__name__ == _VIT:
        blocks = model.encoder.layers  # type: ignore[union-attr]
        args = {key: getattr(model, key) for key in (*_VIT_ARGS, "representation_size")}
        if isinstance(head := getattr(model.heads, "head", None), nn.Linear):  # what the model says goes stale
            args["num_classes"] = head.out_features
        return _VIT, {**args, "num_layers": len(blocks), "num_heads": blocks[0].num_heads}  # type: ignore[arg-type,index,union-attr]
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return _registered(model, cls.__name__, {"num_classes": heads[-1].out_features}) if heads else None


def _registered(model: nn.Module, family: str, args: Args) -> tuple[str, Args] | None:
    """The first registered name whose model has the same shapes, but for layers that compression changed."""
    import torch
    import torchvision.models

    changed = structure(model).keys()

    def shapes(of: nn.Module) -> dict[str, Any]:
        return {
            name: tensor.shape
            for name, tensor in of.state_dict().items()
            if not any(name.startswith(f"{layer}.") for layer in changed)
        }

    own = shapes(model)
    for name in torchvision.models.list_models(module=torchvision.models):
        if family in _FAMILIES and name.startswith(_FAMILIES[family]):
            with torch.device("meta"):
                twin = torchvision.models.get_model(name, weights=None, **args)
            if shapes(twin) == own:
                return name, args
    return None


def _check_torchvision(name: str, args: Mapping[str, Any]) -> Args:
    try:
        import torchvision.models
    except ImportError as cause:
        raise InputError(
            f"{name} is a model of torchvision, which is not installed: pip install torchvision"
        ) from cause
    known = [
        n for n in torchvision.models.list_models(module=torchvision.models) if n.startswith((*_FAMILIES.values(),))
    ]
    if name not in (*known, _VIT):
        raise InputError(f"{name[:80]!r} is not a model of torchvision that vitlr rebuilds")
    allowed = {*_VIT_ARGS, "representation_size", "num_layers", "num_heads"} if name == _VIT else {"num_classes"}
    if unknown := args.keys() - allowed:
        raise InputError(f"the model argument {min(unknown)[:80]!r} is not one that vitlr stores in a file")
    return {key: plain(key, value, 0) for key, value in args.items()}


def _build_of_torchvision(name: str, args: Args) -> nn.Module:
    import torchvision.models

    if name == _VIT:
        return torchvision.models.VisionTransformer(**args)
    return torchvision.models.get_model(name, weights=None, **args)


LIBRARIES = {
    "transformers": Library(_find_in_transformers, _check_transformers, _build_of_transformers),
    "torchvision": Library(_find_in_torchvision, _check_torchvision, _build_of_torchvision),
    "open_clip": Library(open_clip_towers.find, open_clip_towers.check, open_clip_towers.build),
}


def find(model: nn.Module) -> dict[str, Any] | None:
    """{library, name, args} of a model of one of these libraries; None of any other."""
    for library, of in LIBRARIES.items():
        if (found := of.find(model)) is not None:
            return {"library": library, "name": found[0], "args": found[1]}
    return None


def check(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The origin, if it names a known model and whitelisted plain arguments only. Raises `InputError`."""
    name, args = origin["name"], origin["args"]
    if not isinstance(name, str) or not isinstance(args, Mapping):
        raise InputError("the origin is not a model's name and arguments")
    return {**origin, "args": LIBRARIES[origin["library"]].check(name, args)}


def build(origin: Mapping[str, Any]) -> nn.Module:
    """The model of a checked origin. Raises `InputError` with the library's reason where the arguments do not fit."""
    try:
        return LIBRARIES[origin["library"]].build(origin["name"], origin["args"])
    except InputError:
        raise
    except Exception as cause:  # an architecture may raise anything on arguments it was not made for
        raise InputError(f"{origin['library']} cannot build {origin['name']}: {one_line(cause)}") from cause
