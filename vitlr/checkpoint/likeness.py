"""Whether a model that was loaded is the one that was saved: what its modules are, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vitlr.checkpoint.evaluated import in_evaluation, scalars
from vitlr.data.batches import call, noise_image, tensors_in
from vitlr.data.preprocessing import input_size
from vitlr.errors import InputError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import like

_KEPT = 32  # numbers of the answer that a file keeps
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # what machines and kernels may differ by; other dtypes more
_COARSE = 0.1


def image_of(model: nn.Module) -> tuple[Any, Any] | None:
    """Shape and dtype of one image, as compression left them or as the model says; None where nothing does."""
    found = (getattr(model, "vitlr_info", None) or {}).get("image")
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return found[0], found[1]
    try:
        return input_size(model), None
    except InputError:
        return None


def answer(model: nn.Module, image: tuple[Any, Any] | None) -> dict[str, Any] | None:
    """What the model answers to an image of noise: some numbers, and the norm of all; None where it cannot be run."""
    if image is None:
        return None
    try:
        with evaluation_mode(model), torch.no_grad():
            found = [t.double().flatten().cpu() for t in tensors_in(call(model, noise_image(model, image)))]
    except Exception:  # whatever a forward raises on an image that it cannot take
        return None
    whole = torch.cat(found) if found else torch.empty(0)
    if not len(whole) or not torch.isfinite(whole).all():
        return None
    places = torch.linspace(0, len(whole) - 1, min(_KEPT, len(whole))).long()
    shape, dtype = image
    plain = {key: list(value) for key, value in shape.items()} if isinstance(shape, Mapping) else list(shape)
    return {"image": [plain, dtype], "numbers": whole[places].tolist(), "norm": float(whole.norm()), "of": len(whole)}


def check_answer(model: nn.Module, saved: Any) -> None:
    """`InputError` where the model answers otherwise than it did when it was saved."""
    if saved is None:
        return
    found = answer(model, tuple(saved["image"]))
    if found is None or found["of"] != saved["of"] or len(found["numbers"]) != len(saved["numbers"]):
        raise InputError(_OTHER.format("it cannot be run on an image of noise as the saved one was"))
    a, b = (torch.tensor([*side["numbers"], side["norm"]], dtype=torch.float64) for side in (found, saved))
    difference = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))
    if not difference <= _TOLERANCE.get(like(model).dtype, _COARSE):
        raise InputError(_OTHER.format(f"on an image of noise its answer is off by {difference:.2g}, relative"))


_OTHER = (
    "the model is not the one that was saved: {}; give one of the same architecture (activation, heads, norms, image "
    "size) and library version"
)


def blueprint(model: nn.Module) -> dict[str, Any]:
    """The class of every module and what it holds in plain values, equal ones once."""
    kinds: list[Any] = []
    modules: dict[str, int] = {}
    for name, module in model.named_modules():
        kind = [type(module).__qualname__, {k: list(v) if isinstance(v, tuple) else v for k, v in scalars(module)}]
        if kind not in kinds:
            kinds.append(kind)
        modules[name] = kinds.index(kind)
    return {"kinds": kinds, "modules": modules}


def check_blueprint(model: nn.Module, saved: Any) -> None:
    """`InputError` for the first module that is of another class, or holds another value, than when it was saved.

    What only one of the two holds does not count: libraries add attributes from version to version. Nor does what only
    training looks at.
    """
    if saved is None:
        return
    now = blueprint(model)
    for name, index in saved["modules"].items():
        if name not in now["modules"] or index >= len(saved["kinds"]):
            continue
        was, found = saved["kinds"][index], now["kinds"][now["modules"][name]]
        (kind, values), (kind_now, values_now) = in_evaluation(*was), in_evaluation(*found)
        label = name or "the model"
        if kind != kind_now:
            raise InputError(_OTHER.format(f"{label} is a {found[0]}, saved it was a {str(was[0])[:80]}"))
        for key in values.keys() & values_now.keys():
            if values[key] != values_now[key]:
                said = f"{label}.{key} is {values_now[key]!r:.80}, saved it was {values[key]!r:.80}"
                raise InputError(_OTHER.format(said))
