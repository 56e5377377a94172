"""What a model's file may hold: its header by kinds, its tensors by what the rebuilt model has in their places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.checkpoint.origins import hidden_buffers
from vitlr.errors import InputError
from vitlr.nn import Int8Linear
from vitlr.runtime.kinds import NAME, NONE, PLAIN, among, check, number, text, tuple_of, whole

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "random")  # those of timm
DATA: dict[str, Any] = {
    "input_size": tuple_of(whole(1, 2**15), 3, 3),
    "interpolation": among(*_INTERPOLATIONS),
    "mean": tuple_of(number(-1e6, 1e6), 1, 4),
    "std": tuple_of(number(1e-6, 1e6), 1, 4),
    "crop_pct": number(0.01, 10) | NONE,
    "crop_mode": text(32) | NONE,
}
_SHAPE = tuple_of(whole(1, 2**15), 1, 4)
ANSWER: dict[str, Any] = {
    "image": tuple_of(PLAIN, 2, 2),  # its shape and dtype, by name where there are several
    "numbers": [number()],
    "norm": number(0),
    "of": whole(1),
}
BLUEPRINT: dict[str, Any] = {"kinds": [tuple_of(PLAIN, 2, 2)], "modules": {"*": whole(0)}}
_PIXELS = 2**23  # of the image that a file's answer is of
HEADER: dict[str, Any] = {
    "origin": PLAIN,  # `check_origin` knows more
    "structure": {"*": PLAIN},  # and so does `restructure`
    "fused": [NAME],
    "visible": [NAME],
    "tied": {"*": NAME},
    "buffers": {"*": among(*DTYPES)},
    "base?": text(160) | NONE,
    "dtype?": among("None", *DTYPES),
    "data": {"*": PLAIN},
    "versions?": {"*": NAME},
    "digest": text(80),
    "answer?": PLAIN,
    "blueprint?": PLAIN,
    "*": PLAIN,
}


def check_header(header: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` for the first entry that is not of its kind."""
    check(header, HEADER, where)
    check(header["data"], {f"{key}?": kind for key, kind in DATA.items()}, f"{where}: the data config")
    for key, kind in (("answer", ANSWER), ("blueprint", BLUEPRINT)):
        if header.get(key) is not None:
            check(header[key], kind, f"{where}: the {key}")
    if header.get("answer") is not None:
        shape, dtype = header["answer"]["image"]
        _check_image(shape, dtype, f"{where}: the image of the answer")
    for kind in (header.get("blueprint") or {"kinds": []})["kinds"]:
        check(kind[0], NAME, f"{where}: a class")
        check(kind[1], {"*": PLAIN}, f"{where}: what a class holds")


def _check_image(shape: Any, dtype: Any, where: str) -> None:
    """Raise `InputError` for an image that is none, or takes more memory than any model's."""
    if isinstance(shape, Mapping):
        check(dtype, {"*": NAME} if dtype is not None else NONE, where)
        for key, value in shape.items():
            _check_image(value, (dtype or {}).get(key), where)
        return
    check(shape, _SHAPE, where)
    check(dtype, among(*DTYPES, "int64", "int32", "bool") | NONE, where)
    if math.prod(shape) > _PIXELS:
        raise InputError(f"{where}: {shape} are more than {_PIXELS} numbers")


def casts(buffer: Tensor) -> bool:
    """Whether `.half()` and the like reach a table, so that its dtype has to be kept."""
    return buffer.dtype in DTYPES.values()


def check_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `InputError` unless numbers are in one of `DTYPES`, the same one within a module, and all else as built."""
    own = {name: value.dtype for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    of_bytes = {name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}  # always fp32
    of_module: dict[str, tuple[str, torch.dtype]] = {}
    for name, tensor in tensors.items():
        expected = own.get(name, tensor.dtype)
        if not expected.is_floating_point:
            if tensor.dtype != expected:
                raise InputError(f"tensor {name:.120} is {tensor.dtype}, expected {expected}")
            continue
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"tensor {name:.120} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        module = name.rpartition(".")[0]
        if module not in of_bytes:
            module = module.removesuffix(".down").removesuffix(".up")  # two factors are one layer
        first, dtype = of_module.setdefault(module, (name, tensor.dtype))
        if tensor.dtype != dtype:
            raise InputError(f"tensor {name:.120} is {tensor.dtype}, and {first:.120} is {dtype}; expected one dtype")


def check_ties(model: nn.Module, shapes: Mapping[str, Any], tied: Mapping[str, str]) -> None:
    """Raise `InputError` for ties of what is stored itself, or of a parameter to what is none."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, known in tied.items():
        if name in shapes or (name in parameters) != (known in parameters):
            raise InputError(f"tensor {name:.120} is tied to {known:.120}: expected two parameters, or two buffers")


def check_casts(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Raise `InputError` where a table's dtype is told that the model does not have, or that holds no fractions."""
    tables = {name: buffer for name, _, _, buffer in hidden_buffers(model)}
    for name in dtypes:
        if name not in tables or not casts(tables[name]):
            raise InputError(f"buffer {name:.120} is no table of numbers in this model, expected no dtype for it")
