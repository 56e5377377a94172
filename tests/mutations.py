"""Files that lie, from a seed: bits flipped, cut, headers rewritten with a digest that fits, and what came of each."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from vitlr.errors import VitlrError

SECONDS, MEGABYTES = 2.0, 200
ODD: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, 10**6, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x",
    "\ud800", "x" * 5000, "a\0b", "../../etc/passwd", [], {}, [[]], [None], {"a": None}, [1, 2, 3], ["x"] * 50,
    json.loads("[" * 20 + "]" * 20),
]  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    return json.loads(metadata["vitlr"]), tensors


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(part, (dict, list)):
            found += places(part)
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three places given odd values, taken out, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        spots = places(value)
        if not spots:
            break
        holder, key = rng.choice(spots)
        kind = rng.random()
        if kind < 0.6:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del holder[key]
        elif kind < 0.9 and isinstance(holder, dict):
            holder[rng.choice(["x", "kind", "rank", "", "depth", "\ud800"])] = copy.deepcopy(rng.choice(ODD))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            other, there = rng.choice(spots)
            other[there] = copy.deepcopy(holder[key]) if (other is not holder or there != key) else None
    return value


def changed_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """One tensor of another dtype, shape or values, missing, doubled or renamed."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    floating = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)
    kind = rng.randrange(8)
    if kind == 0:
        tensors[name] = tensor.to(rng.choice([*floating, torch.int64, torch.int8, torch.uint8, torch.bool]))
    elif kind == 1:
        tensors[name] = torch.zeros(rng.choice([(), (0,), (1,), (3, 3), (*tensor.shape, 1), tensor.shape[1:]]))
    elif kind == 2:
        del tensors[name]
    elif kind == 3:
        tensors[rng.choice(["x", f"{name}.x", "blocks.99.attn.qkv.weight"])] = tensor.clone()
    elif kind == 4:
        tensors[rng.choice(sorted(tensors))] = tensor.clone()
    elif kind == 5:
        tensors[name] = -tensor if tensor.dtype != torch.bool else ~tensor
    elif kind == 6 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 1e30]))
    else:
        tensors |= {f"empty.{i}": torch.zeros(0) for i in range(1000)}
    return tensors


def packed(header: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """A safetensors file of them."""
    return save(tensors, {"vitlr": json.dumps(header)})


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, or a length that is not true."""
    kind, data = rng.randrange(5), bytearray(content)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 100))
    elif kind == 3:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**62, 2**64 - 1, len(data)]))
    else:
        start = rng.randrange(min(3000, len(data)))
        data[start : start + 8] = rng.randbytes(8)
    return bytes(data)


class Tally:
    """What became of files: how many were refused by our own error, and the slowest and the largest of them."""

    def __init__(self) -> None:
        self.tried = self.refused = 0
        self.seconds = 0.0
        self.faults: list[str] = []
        self.last = ""
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, what: str, use: Callable[[], Any]) -> bool:
        """Whether it was taken; anything but our own error, in time and with a short message, is a fault."""
        self.tried += 1
        start = time.thread_time()  # of this thread: a busy machine is no fault of the file's
        try:
            use()
            taken = True
        except VitlrError as cause:
            taken = False
            self.refused += 1
            self.last = str(cause)
            if len(str(cause)) > 1500 or not str(cause):
                self.faults.append(f"{what}: a message of {len(str(cause))} letters")
        except Exception as cause:
            taken = False
            self.faults.append(f"{what}: {type(cause).__name__}: {str(cause)[:200]}")
        spent = time.thread_time() - start
        self.seconds = max(self.seconds, spent)
        if spent > SECONDS:
            self.faults.append(f"{what}: {spent:.1f} s")
        return taken

    @property
    def megabytes(self) -> float:
        """How much the peak of this process has grown."""
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) / 1024

    def check(self) -> None:
        print(f"{self.tried} tried, {self.refused} refused, {self.seconds:.2f} s, {self.megabytes:.0f} MB")
        assert not self.faults, "\n".join(self.faults[:20])
        assert self.megabytes < MEGABYTES
