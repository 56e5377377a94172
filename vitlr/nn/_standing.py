"""Whether a tree of modules is still what it was, so that what was found out about it need not be found out again."""

from __future__ import annotations

from itertools import chain
from operator import is_

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # those of gradients hear nothing where none is asked for
_CONTENTS = ("_modules", "_parameters", "_buffers")
_GIVEN = frozenset(vars(nn.Module()))  # what torch gives every module: these dicts, and whether it trains


class Standing:
    """A module with all below it, as it is: classes, attributes, children, and where the content of its tensors lies.

    Another tensor or another memory in a tensor's place is seen, and a write that torch counts where kernels have a
    copy: of integers, which they pack, and of what does not lie in one piece. All else they read where it lies, and so
    nothing is looked at in vain: weights drive these objects out of the caches from call to call. `training` does not
    count. The root itself is not referred to, so that this may be kept for as long as it lives.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._below, self._classes = modules[1:], list(map(type, modules))
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        contents = [getattr(module, name) for module in modules for name in _CONTENTS]
        self._contents, self._empty = [held for held in contents if held], [held for held in contents if not held]
        self._vars = list(map(vars, modules))
        own = [(held, name) for held in self._vars for name in held if name not in _GIVEN]
        self._owners, self._names = [held for held, _ in own], [name for _, name in own]
        self._counts, self._values = list(map(len, self._vars)), self._now()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._copied = [t for t in self._tensors if not (t.is_floating_point() and t.is_contiguous())]
        self._places = None if any(map(Tensor.is_inference, self._tensors)) else self._places_now()

    def _now(self) -> list[object]:
        return [*map(dict.get, self._owners, self._names), *chain.from_iterable(map(dict.values, self._contents))]

    def _places_now(self) -> list[int]:
        return [*(t._version for t in self._copied), *map(Tensor.data_ptr, self._tensors)]

    def holds(self, root: nn.Module) -> bool:
        """Whether nothing of that root has changed, and nobody listens; False where torch counts no writes."""
        if self._places is None or any(self._hooks) or any(self._empty) or _has_any_global_hook():
            return False
        if self._counts != list(map(len, self._vars)) or self._classes != [type(root), *map(type, self._below)]:
            return False
        now = self._now()
        same = len(now) == len(self._values) and all(map(is_, now, self._values))
        return same and self._places == self._places_now()
