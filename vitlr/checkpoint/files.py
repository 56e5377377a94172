"""One safetensors file that rebuilds its model: weights, where the model came from, and what was done to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vitlr.anatomy import timm
from vitlr.checkpoint import contents, folders, likeness
from vitlr.checkpoint.bounds import Held
from vitlr.checkpoint.contents import casts
from vitlr.checkpoint.origins import build, check_origin, describe, differences, find_origin, hidden_buffers, unfilled
from vitlr.checkpoint.structure import restructure, structure
from vitlr.data import preprocessing
from vitlr.errors import InputError
from vitlr.measuring.cost import is_rounded
from vitlr.nn import Fp8Linear, Int8Linear, LowRankLinear, QuantizedLinear, ResidualLowRankLinear, SelectedLinear
from vitlr.planning.plans import Plan
from vitlr.runtime import compact
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import plain_parts, unwrapped, without_compiled_parts
from vitlr.runtime.places import check_writable
from vitlr.runtime.storage import check_digest, digest, load_header, load_tensors, save_tensors
from vitlr.runtime.words import one_line
from vitlr.surgery import fusion
from vitlr.surgery.alien import guard

SCHEMA = 2  # 2 stores rounded models by what they were rounded to; all others are written as 1
_SWAPPED = (LowRankLinear, ResidualLowRankLinear, SelectedLinear, QuantizedLinear, Int8Linear)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    model_args: Mapping[str, Any] | Literal[False] | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
    recipe: Any = None,
    metrics: Any = None,
) -> None:
    """Write `model` to one safetensors file, atomically, so that `load(path)` gives bit-identical logits anywhere.

    `model_args`: what timm's `create_model` was called with besides the name; known for models made by
    `vitlr.create_model`, guessed otherwise (classes, channels, image size, pooling). The model is rebuilt from
    them and compared before anything is written; models of transformers and torchvision say it themselves. False
    stores no origin: such a file, and one of a model that none of these libraries rebuilds, is read with
    `load(path, model=...)`. Of DataParallel and its like the model within is written. `plan`, `recipe`, `metrics` are
    kept as JSON for the reader.
    Raises `InputError` where the rebuilt model differs or the place is not writable, `RunError` where the disk is full.
    """
    path = check_writable(path)
    model = _inside(model)
    with plain_parts(model):
        _save(path, model, model_args, plan, recipe, metrics)


def _inside(model: nn.Module) -> nn.Module:
    """The model in wrappers for several devices and averages, with what is known of it: files know no wrappers."""
    inner = unwrapped(model)
    for key in ("vitlr_info", "vitlr_origin", "vitlr_base"):
        if hasattr(model, key) and not hasattr(inner, key):
            setattr(inner, key, getattr(model, key))
    return inner


def _save(
    path: Path,
    model: nn.Module,
    model_args: Mapping[str, Any] | Literal[False] | None,
    plan: Plan | Mapping[str, Any] | None,
    recipe: Any,
    metrics: Any,
) -> None:
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise InputError('this model multiplies 8-bit floats, which files do not hold: save it before fuse(bits="fp8")')
    tensors, tied = _state(model)
    info = getattr(model, "vitlr_info", None) or {}
    header = {
        "origin": None if model_args is False else find_origin(model, model_args),
        "structure": structure(model),
        "fused": fusion.fused_names(model),
        "visible": [name for name, module in timm.switchable(model) if getattr(module, timm.SWITCH)],
        "tied": tied,
        "buffers": {name: _name(buffer.dtype) for name, _, _, buffer in hidden_buffers(model) if casts(buffer)},
        "dtype": str(next((t.dtype for t in tensors.values() if t.is_floating_point()), None)).removeprefix("torch."),
        "data": _data_config(model),
        "plan": plan.to_dict() if isinstance(plan, Plan) else plan if plan is not None else info.get("plan"),
        "recipe": info.get("recipe") if recipe is None else recipe,
        "metrics": metrics.to_dict() if hasattr(metrics, "to_dict") else metrics,
        "versions": _versions(),
        "answer": likeness.answer(model, likeness.image_of(model)),
    }
    if getattr(model, "vitlr_base", None) is not None:
        header["base"] = model.vitlr_base
    contents.check_dtypes(model, tensors)
    schema = SCHEMA if is_rounded(model) else 1
    if schema > 1:
        tensors = {name + form: part for name, t in tensors.items() for form, part in compact.stored(t).items()}
    if header["origin"] is not None and (problem := _not_rebuilt(model, header, _held(tensors))) is not None:
        if header["origin"]["library"] == "timm":
            raise InputError(
                f"{describe(header['origin'])} does not rebuild this model ({problem}); pass model_args= with the "
                "arguments it was created with, or model_args=False to load it with load(path, model=...)"
            )
        header["origin"] = None
    if header["origin"] is None:
        header["blueprint"] = likeness.blueprint(model)
    try:
        header = json.loads(json.dumps(header))
    except (TypeError, ValueError, RecursionError) as cause:
        raise InputError(f"plan, recipe and metrics must be plain JSON values: {cause}") from cause
    signed = {**header, "digest": _digest(tensors, header)}
    contents.check_header(signed, "what would be written")
    save_tensors(path, tensors, signed, kind="model", schema=schema)


def load(
    path: str | os.PathLike[str], *, model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Rebuild the model that `save` wrote, in eval mode on `device`; `model.vitlr_info` says what the file says of it.

    `path` may also be `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, as `save_pretrained` and `push_to_hub` wrote them.
    `model`: a dense model of the same architecture, where the file names no origin; it is copied, not changed.
    Shapes are compared before memory is taken, a digest over header and tensors after reading; then what the modules
    are and hold, and the answer to an image of noise, with those that were saved.
    Raises `InputError` for a file that is missing, cut short, foreign, of a newer schema, damaged, or of another model.
    """
    path, device = folders.path_of(path), _there(device)
    header = load_header(path, kind="model", schema=SCHEMA)
    try:
        return _load(path, header, model).to(device)
    except InputError as cause:
        raise cause if str(cause).startswith(str(path)) else InputError(f"{path}: {cause}") from cause


def _there(device: torch.device | str) -> torch.device:
    """The device, if there is one by that name; `InputError` otherwise."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as cause:  # torch says it by RuntimeError, AssertionError, AcceleratorError, ...
        raise InputError(f"device {device!s:.40} is not there: {one_line(cause, 120)}") from cause
    return found


def _load(path: Path, header: dict[str, Any], model: nn.Module | None) -> nn.Module:
    contents.check_header(header, "its header is damaged")
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    held = Held.of(shapes, path.stat().st_size)
    origin = header["origin"]
    if model is not None:
        rebuilt = duplicate(unwrapped(model))
        without_compiled_parts(rebuilt)
        rebuilt = _reshape(rebuilt, header)
        _check_fit(rebuilt, shapes, header, held)
    elif origin is None:
        raise InputError("it does not name the model it was made from; pass a dense one: load(path, model=...)")
    else:
        origin = check_origin(origin)
        held.check_depth(origin["args"])
        _check_fit(_reshape(build(origin, "meta", held), header), shapes, header, held)
        rebuilt = _reshape(build(origin, "cpu"), header)
    tensors, _ = load_tensors(path, kind="model", schema=SCHEMA)
    check_digest(path, header["digest"], _digest(tensors, {k: v for k, v in header.items() if k != "digest"}))
    _fill(rebuilt, tensors, header)
    guard(rebuilt)
    likeness.check_blueprint(rebuilt, header.get("blueprint"))
    likeness.check_answer(rebuilt, header.get("answer"))
    if model is None:
        rebuilt.vitlr_origin = origin
        if isinstance(getattr(rebuilt, "pretrained_cfg", None), dict):
            rebuilt.pretrained_cfg.update({k: _tuples(v) for k, v in header["data"].items()})  # type: ignore[operator,union-attr]
    rebuilt.vitlr_base = header.get("base")  # type: ignore[assignment]
    keys = ("plan", "recipe", "metrics", "data", "dtype", "versions")
    info = {key: header.get(key) for key in keys}
    rebuilt.vitlr_info = {**info, "image": (header.get("answer") or {}).get("image")}  # type: ignore[assignment]
    return rebuilt.eval()


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state on the CPU without what is stored twice, and {name: first name} of tied parameters."""
    owners = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise InputError(f"{name} is {'on the meta device' if isinstance(value, Tensor) else 'not a tensor'}")
        kinds = {type(value), type(owners.get(name, value))}
        if foreign := kinds - {Tensor, nn.Parameter}:
            raise InputError(
                f"{name} is a {foreign.pop().__name__}, no plain tensor: save the model before it is quantised or "
                "sharded, and do that again after loading"
            )
        known = first.setdefault(id(owners.get(name, value)), name)
        if known != name:
            tied[name] = known
            continue
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory; views of one storage are written as copies
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, tied


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _held(tensors: Mapping[str, Tensor]) -> Held:
    """What a file of these tensors holds."""
    return Held.of({name: tuple(t.shape) for name, t in tensors.items()}, sum(t.nbytes for t in tensors.values()))


def _not_rebuilt(model: nn.Module, header: dict[str, Any], held: Held) -> str | None:
    """Rebuild as `load` will, and say what differs; None where nothing does."""
    try:
        held.check_depth(header["origin"]["args"])
        twin = _reshape(build(header["origin"], "cpu", held), header)
        problem = differences(model, twin)
        held.check_tables(sum(buffer.nbytes for _, _, _, buffer in hidden_buffers(twin)))
    except InputError as cause:
        return str(cause)
    return problem


def _reshape(model: nn.Module, header: Mapping[str, Any]) -> nn.Module:
    """Do to a dense model, in place, what was done to the saved one: switches, low-rank layers, fused MLPs."""
    with unfilled():
        restructure(model, header["structure"])
    for name, attention in timm.switchable(model):
        swapped = isinstance(attention.qkv, _SWAPPED)
        on = name in header["visible"] or swapped
        setattr(attention, timm.SWITCH, on)
    fusion.fuse_again(model, header["fused"])
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> None:
    # clone: the file's tensors lie at any multiple of 8 bytes, where BLAS may round otherwise than in aligned memory
    if header["schema"] > 1:
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        tensors = compact.restored(tensors, shapes)
    contents.check_dtypes(model, tensors)
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    aliases = {name: state[known] for name, known in header["tied"].items()}
    try:
        model.load_state_dict(state | aliases, strict=True, assign=True)
    except RuntimeError as cause:  # a module refuses values, as a folded scale does
        raise InputError(one_line(cause)) from cause
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantizedLinear, Int8Linear)):
            layer.check(f"layer {name}")
    for name, known in header["tied"].items():
        (source, s), (target, t) = (n.rpartition(".")[::2] for n in (known, name))
        setattr(model.get_submodule(target), t, getattr(model.get_submodule(source), s))
    for name, module, key, buffer in list(hidden_buffers(model)):
        if name in header["buffers"]:
            module._buffers[key] = buffer.to(contents.DTYPES[header["buffers"][name]])


def _check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, Any], held: Held) -> None:
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    tied = header["tied"]
    if header["schema"] > 1:
        shapes = compact.shapes(shapes, expected)
    found = {**shapes, **{name: shapes.get(known, (-1,)) for name, known in tied.items()}}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            a, b = expected.get(name, "no such tensor"), found.get(name, "none")
            raise InputError(f"tensor {name[:120]}: the model has {a}, the file has {b}")
    contents.check_ties(model, shapes, tied)
    contents.check_casts(model, header["buffers"])
    held.check_tables(sum(buffer.nbytes for _, _, _, buffer in hidden_buffers(model)))


def _data_config(model: nn.Module) -> dict[str, Any]:
    if not isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        try:
            return preprocessing.data_config(model)
        except InputError:  # nothing describes it
            return {}
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    return {key: config[key] for key in contents.DATA if key in config}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _versions() -> dict[str, str]:
    try:
        import timm
    except ImportError:
        return {"torch": torch.__version__}
    return {"torch": torch.__version__, "timm": timm.__version__}


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 over the header's JSON and every tensor's name, dtype, shape and bytes, in order of names."""
    body = {key: value for key, value in header.items() if key not in ("kind", "schema")}
    return digest(tensors, json.dumps(body, sort_keys=True, separators=(",", ":")))
