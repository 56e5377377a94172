"""An optimizer's state as tensors and JSON values, checked before it is put back."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.runtime.kinds import NAME, PLAIN, check, number, shown, tuple_of, whole

_COUNTS = ("step", "mu_product")
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # as their parameter


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and everything else as JSON values, which keep floats to the bit."""
    body = optimizer.state_dict()
    items = [(index, key, value) for index, state in body["state"].items() for key, value in state.items()]
    tensors = {f"optimizer.{index}.{key}": value for index, key, value in items if isinstance(value, Tensor)}
    numbers = [[index, key, value] for index, key, value in items if not isinstance(value, Tensor)]
    groups = [
        {key: value for key, value in g.items() if key != "params" and _plain(value)} for g in body["param_groups"]
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def check_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: Any, where: str) -> None:
    """Raise `InputError` unless these may be the state of an optimizer of these parameters."""
    check(plain, {"numbers": [tuple_of(PLAIN, 3, 3)], "groups": [{"*": PLAIN}]}, f"{where}: optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        p = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        shape = None if p is None else torch.Size() if key in _COUNTS else p.shape
        other = key not in (*_COUNTS, *_SHAPED)  # of an optimizer that is not Adam's or SGD's kind
        if p is None or (tensor.shape != shape and not other) or tensor.dtype not in (torch.float32, p.dtype):
            raise InputError(f"{where}: optimizer.{name:.120} is {tensor.dtype} {list(tensor.shape)}, which none has")
        if not bool(torch.isfinite(tensor).all()) or (key == "step" and bool((tensor < 1).any())):
            raise InputError(f"{where}: optimizer.{name:.120} holds numbers that no steps give")
        keys.setdefault(int(index), set()).add(key)
    for index, key, value in plain["numbers"]:
        if not (whole(0, len(parameters) - 1).holds(index) and NAME.holds(key) and number().holds(value)):
            raise InputError(f"{where}: optimizer {shown([index, key, value])}, which it does not have")
        keys.setdefault(index, set()).add(key)
    if any(own != next(iter(keys.values())) for own in keys.values()):
        raise InputError(f"{where}: its optimizer has other sums for some parameters than for others")
    if len(plain["groups"]) != len(optimizer.param_groups):
        raise InputError(f"{where}: {len(plain['groups'])} groups of parameters, not {len(optimizer.param_groups)}")
    for group, kept in zip(optimizer.param_groups, plain["groups"], strict=True):
        for key, value in kept.items():
            if key not in group or not _alike(value, group[key]):
                raise InputError(f"{where}: optimizer {key:.80} {shown(value)}, which it does not have")


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        p = parameters[int(index)]
        optimizer.state[p][key] = tensor.to("cpu" if key == "step" else p.device)
    for index, key, value in plain["numbers"]:
        optimizer.state[parameters[index]][key] = value
    for group, kept in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in kept.items()})


def _alike(value: Any, own: Any) -> bool:
    """Whether a value is of the same kind as the one it takes the place of, and finite."""
    if isinstance(own, (tuple, list)):
        return isinstance(value, list) and len(value) == len(own) and all(map(_alike, value, own))
    if isinstance(own, (bool, str)) or own is None:
        return type(value) is type(own)
    return number().holds(value)


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
