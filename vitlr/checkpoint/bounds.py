"""How much work a file may ask for before its shapes are known to fit: calls, sizes and depth, by what it holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitlr.errors import InputError

# What architectures of timm ask for (docs/reliability.md): a million calls, more where tables are made in Python, which
# grow with the file; results of 28 million entries, 284 million of them together, and 200 MiB of tables.
_CALLS = 1_500_000
_RESULT = 32 * 2**20  # bytes
_RESULTS = 320_000_000  # entries
_TABLES = 64 * 2**20  # bytes
_DEPTHS = frozenset({"depth", "depths", "layers", "num_hidden_layers", "num_layers", "stages"})
_FREE = frozenset(
    {"__get__", "view", "reshape", "detach", "transpose", "unsqueeze", "expand", "flatten", "permute", "__getitem__"}
)  # views, and memory that nobody touches


@dataclass(frozen=True)
class Held:
    """What a file holds: tensors that are not empty, their entries and their bytes."""

    tensors: int
    entries: int
    bytes: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], size: int) -> Held:
        """By the shapes of its tensors and its size in bytes."""
        counts = [math.prod(shape) for shape in shapes.values()]
        return cls(sum(count > 0 for count in counts), sum(counts), size)

    def check_depth(self, args: Mapping[str, Any]) -> None:
        """Raise `InputError` for a depth beyond the number of tensors: every block holds some that are not empty."""
        for key in _DEPTHS & args.keys():
            value = args[key]
            values = value if isinstance(value, (tuple, list)) else (value,)
            if not all(type(v) is int for v in values) or sum(values) > self.tensors:
                raise InputError(f"the model argument {key}={value!r} does not fit a file of {self.tensors} tensors")
        for inner in args.values():
            if isinstance(inner, Mapping):
                self.check_depth(inner)

    def check_tables(self, taken: int) -> None:
        """Raise `InputError` for more bytes of tables than a model of this size computes."""
        if taken > _TABLES + 4 * self.bytes:
            raise InputError(f"its model computes tables of {taken} bytes, the file has {self.bytes}; refused")


class Bounded(TorchFunctionMode):
    """Context that ends a model's construction, by `InputError`, once it goes beyond what a file gives reason for.

    Counted are the calls that Python makes, so that loops end that build nothing, and the results of torch's functions.
    """

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held, self.calls, self.entries = held, 0, 0

    def __enter__(self) -> Bounded:
        self._before = sys.getprofile()
        most = _CALLS + self.held.entries

        def count(*_: Any) -> None:
            self.calls += 1
            if self.calls > most:
                sys.setprofile(self._before)
                raise InputError(f"building it takes more than {most} calls, too many for a file of its size; refused")

        super().__enter__()
        sys.setprofile(count)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.setprofile(self._before)
        super().__exit__(*exception)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        touched = name not in _FREE and not name.startswith("empty")
        if touched and isinstance(result, Tensor) and not isinstance(result, nn.Parameter):
            self._add(result)
        return result

    def _add(self, result: Tensor) -> None:
        self.entries += result.numel()
        if result.nbytes > _RESULT + self.held.bytes or self.entries > _RESULTS + 4 * self.held.entries:
            raise InputError(f"building it computes {list(result.shape)} and more, too much for its size; refused")
