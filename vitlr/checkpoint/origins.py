"""A model from its name and plain arguments: found out, built without weights, compared with the one at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitlr.checkpoint import other_libraries
from vitlr.checkpoint.arguments import READ, head_width
from vitlr.checkpoint.bounds import Bounded, Held
from vitlr.checkpoint.evaluated import in_evaluation, scalars
from vitlr.errors import InputError
from vitlr.runtime.modules import class_of, plain_parts
from vitlr.runtime.words import one_line

Origin = dict[str, Any]
"""{"library": "timm" or one of `other_libraries`, "name": str, "args": {str: plain value}}"""

# fmt: off
ARGUMENTS = frozenset({
    "act_layer", "always_partition", "attn_drop_rate", "class_token", "conv_mlp", "depth", "depths", "dims",
    "distilled", "drop_path_rate", "drop_rate", "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims",
    "fc_norm", "final_norm", "global_attn_indexes", "global_pool", "head_init_scale", "in_chans", "img_size",
    "init_values", "kernel_sizes",
    "ls_init_value", "mlp_ratio", "no_embed_class", "norm_layer", "num_classes", "num_heads", "num_reg_tokens",
    "output_stride", "patch_drop_rate", "patch_size", "pos_drop_rate", "pos_embed", "pre_norm",
    "pretrained_window_sizes", "proj_bias", "proj_drop_rate", "qk_norm", "qkv_bias", "qkv_fused", "ref_feat_shape",
    "reg_tokens", "scale_attn_inner_norm", "scale_mlp_norm", "stages", "strict_img_size", "swiglu_align_to",
    "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm", "use_post_norm", "use_rel_pos_bias", "use_rot_pos_emb",
    "use_shared_rel_pos_bias", "window_ratio", "window_size",
})
# fmt: on
"""Arguments that may be written to a file and built from one: shapes, counts, switches, names timm looks up itself."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_TEXT = re.compile(r"[A-Za-z0-9_.\-]{0,64}")
_LARGEST = 1_000_000
_SAID = 8  # arguments that messages show
# fmt: off
_FILL = frozenset({
    "add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "kaiming_normal_", "kaiming_uniform_", "mul_", "normal_",
    "sub_", "uniform_", "zero_",
})
# fmt: on


class _Unfilled(TorchFunctionMode):
    """Leave parameters as allocated: their values come from a file, and untouched memory costs no time and no pages."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILL:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return func(*args, **kwargs)


def check_origin(origin: Any) -> Origin:
    """Return `origin` with lists as tuples if it names a known model and whitelisted plain arguments only.

    Raises `InputError` for anything else: what comes from a file is never built, looked up or downloaded unchecked.
    """
    import timm

    if not isinstance(origin, dict) or set(origin) != {"library", "name", "args"}:
        raise InputError("the origin is not a model's library, name and arguments")
    if isinstance(origin["library"], str) and origin["library"] in other_libraries.LIBRARIES:
        return other_libraries.check(origin)
    if origin["library"] != "timm":
        raise InputError(f"the origin is of {str(origin['library'])[:80]!r}, no library that models are rebuilt by")
    name, args = origin["name"], origin["args"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not timm.is_model(name):
        raise InputError(f"{str(name)[:80]!r} is not a model that timm {timm.__version__} knows")
    if not isinstance(args, dict):
        raise InputError("the model's arguments are not a table")
    return {"library": "timm", "name": name, "args": {key: _plain(key, value) for key, value in args.items()}}


def find_origin(model: nn.Module, model_args: Mapping[str, Any] | None = None) -> Origin | None:
    """Return where `model` came from, or None for a model that no library knows.

    By the configuration of transformers, by the names of torchvision; else, in this order: `model.vitlr_origin` (with
    `model_args` in place of its arguments where given); timm's own `pretrained_cfg`, with the arguments that can be
    read off the model. Unlisted arguments are left out: whether the rest suffices is for `differences` to say.
    Raises `InputError` where `model_args` are not plain, whitelisted values.
    """
    origin = getattr(model, "vitlr_origin", None)
    if model_args is None and (found := other_libraries.find(model)) is not None:
        return check_origin(found)
    named = isinstance(origin, dict) and _NAME.fullmatch(str(origin.get("name"))) is not None
    name = str(origin["name"]) if named and origin is not None else _registered_name(model)
    if name is None:
        return None
    if model_args is not None:
        args = dict(model_args)
    elif named and origin is not None:
        args = {key: value for key, value in origin["args"].items() if _is_plain(key, value)}
        if head_width(model) != getattr(model, "num_classes", None):
            args["num_classes"] = head_width(model)
    else:
        args = _guess(model, name)
    return check_origin({"library": "timm", "name": name, "args": args})


def why_not_rebuilt(model: nn.Module) -> str | None:
    """Why a file of this timm model would not rebuild it, in one line; None where it would, or names no origin."""
    try:
        with plain_parts(model):
            origin = find_origin(model)
            other = origin is None or origin["library"] != "timm"
            problem = None if other or origin is None else differences(model, build(origin, "cpu"))
    except InputError as cause:
        return str(cause)
    return None if problem is None or origin is None else f"{describe(origin)} does not rebuild it ({problem})"


def build(origin: Origin, device: str, held: Held | None = None) -> nn.Module:
    """Build the model of a checked origin with its buffers computed and its parameters allocated, not filled.

    On "meta" nothing is allocated at all. `held` is what a file holds, which bounds the work. Raises `InputError` with
    timm's reason where the arguments do not fit.
    """
    import timm

    try:
        bounded = nullcontext() if held is None else Bounded(held)
        with torch.random.fork_rng(devices=[]), torch.device(device), _Unfilled(), bounded:
            if origin["library"] != "timm":
                return other_libraries.build(origin)
            return timm.create_model(origin["name"], pretrained=False, **origin["args"])
    except InputError:
        raise
    except Exception as cause:  # an architecture may raise anything on arguments it was not made for
        raise InputError(f"timm cannot build {describe(origin)}: {one_line(cause)}") from cause


def unfilled() -> TorchFunctionMode:
    """Context in which new modules keep their parameters as allocated."""
    return _Unfilled()


def describe(origin: Origin) -> str:
    """Return the origin as a call: `vit_tiny_patch16_224(num_classes=10)`; of many arguments the first."""
    said = [f"{key}={value!r:.40}" for key, value in origin["args"].items()]
    return f"{origin['name']}({', '.join([*said[:_SAID], *['...'] * (len(said) > _SAID)])})"


def differences(model: nn.Module, twin: nn.Module) -> str | None:
    """Say the first thing in which `twin` would compute something else than `model` given its weights, or None.

    Compared: names and classes of all modules, their scalar attributes, names and shapes of the state, and the values
    of buffers that are not part of the state. Not compared: values of the state, hooks, what only training looks at.
    """
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            return f"module {name or '(model)'} is only in {'the model' if name in ours else 'the rebuilt one'}"
    for name, module in ours.items():
        label = name or "(model)"
        a, b = class_of(module), class_of(theirs[name])
        (kind, mine), (other_kind, other) = (
            in_evaluation(c, dict(scalars(m))) for c, m in ((a, module), (b, theirs[name]))
        )
        if kind != other_kind:
            return f"{label} is a {a}, rebuilt it is a {b}"
        for key in [*mine, *(k for k in other if k not in mine)]:
            x, y = mine.get(key, "absent"), other.get(key, "absent")
            if x != y and not (x != x and y != y):  # NaN is equal to NaN here
                return f"{label}.{key} is {x!r}, rebuilt it is {y!r}"
    return _shapes_differ(model, twin) or _buffers_differ(model, twin)


def hidden_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (qualified name, module, key, tensor) of buffers that are not in the state: tables built, never loaded."""
    for name, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None:
                yield (f"{name}.{key}" if name else key), module, key, buffer


def _shapes_differ(model: nn.Module, twin: nn.Module) -> str | None:
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items() if isinstance(v, Tensor)} for m in (model, twin))
    for key in [*ours, *theirs]:
        a, b = ours.get(key), theirs.get(key)
        if a != b:
            return f"{key} is {_shape(a)}, rebuilt it is {_shape(b)}"
    return None


def _buffers_differ(model: nn.Module, twin: nn.Module) -> str | None:
    theirs = {name: buffer for name, _, _, buffer in hidden_buffers(twin)}
    ours = {name: buffer for name, _, _, buffer in hidden_buffers(model)}
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            return f"buffer {name} is only in {'the model' if name in ours else 'the rebuilt one'}"
        a, b = ours[name].detach().cpu(), theirs[name]
        if a.shape != b.shape or not torch.equal(a, b.to(a.dtype)):
            return f"buffer {name} has other values than the rebuilt one"
    return None


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"


def _registered_name(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not isinstance(config.get("architecture"), str):
        return None
    import timm

    tagged = f"{config['architecture']}.{config.get('tag')}"
    for name in (tagged, config["architecture"]):
        if timm.is_model(name) and (name != tagged or timm.models.is_model_pretrained(name)):
            return str(name)
    return None


def _guess(model: nn.Module, name: str) -> dict[str, Any]:
    """Read off the model what differs from the plain build of its name; anything more must come as model_args."""
    plain = build({"library": "timm", "name": name, "args": {}}, "meta")
    found = {}
    for key, read in READ.items():
        value = read(model)
        if value is not None and value != read(plain) and _is_plain(key, value):
            found[key] = value
    return found


def _is_plain(key: str, value: Any) -> bool:
    try:
        _plain(key, value)
    except InputError:
        return False
    return True


def _plain(key: Any, value: Any) -> Any:
    if key not in ARGUMENTS:
        raise InputError(f"the model argument {str(key)[:80]!r} is not one that vitlr stores in a file")
    return _plain_value(key, value, nested=2)


def _plain_value(key: str, value: Any, nested: int) -> Any:
    if isinstance(value, (tuple, list)) and nested and len(value) <= 16:
        return tuple(_plain_value(key, item, nested - 1) for item in value)
    number = isinstance(value, (int, float)) and abs(value) <= _LARGEST  # NaN compares false
    if value is None or isinstance(value, bool) or number or (isinstance(value, str) and _TEXT.fullmatch(value)):
        return value
    raise InputError(f"the model argument {key}={str(value)[:80]!r} is not a plain value in range")
