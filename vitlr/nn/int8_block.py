"""A block of a transformer whose linears multiply bytes, as two operations: one for each of its halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vitlr.nn._fused import Fused
from vitlr.nn._fused_mlp import activation_name
from vitlr.nn._plain import does_nothing, has_hooks, is_transformed
from vitlr.nn._standing import Standing
from vitlr.nn.folded_scale import FoldedScale
from vitlr.nn.fused_attention import FusedAttention
from vitlr.nn.int8_linear import Int8Linear
from vitlr.nn.int8_mlp import Int8MLP, steps
from vitlr.nn.selected_linear import SelectedLinear
from vitlr.ops.dispatch.registration import Ready, unwatched
from vitlr.ops.layers import int8_attention, int8_chain
from vitlr.ops.layers.int8_chain import Norm
from vitlr.runtime.modules import class_of

# Classes whose forward is known, by name: this package does not import timm.
_BLOCKS = ("timm.models.vision_transformer.Block",)
_NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")


class Parts(NamedTuple):
    """What both operations take; `left` are the channels of qkv that a `SelectedLinear` has, None where it has all."""

    norm1: Norm
    qkv: list[Any]
    left: Tensor | None
    proj: list[Any]
    norm2: Norm
    fc1: list[Any]
    act: str
    fc2: list[Any]


class Known(NamedTuple):
    """The operations of blocks as they were called last, for as long as these and their input are of the same kind."""

    standing: Standing
    kind: tuple
    steps: tuple[Ready, ...]
    asking: tuple[Ready, ...]  # those of the steps that ask the environment for different things

    @classmethod
    def of(cls, root: nn.Module, x: Tensor, steps: Sequence[Ready]) -> Known:
        different = {(step.name, step.prepared.asked): step for step in steps}
        return cls(Standing(root), (x.shape, x.dtype), tuple(steps), tuple(different.values()))

    def holds(self, root: nn.Module, x: Tensor) -> bool:
        asked = (x.shape, x.dtype) == self.kind and all(step.holds() for step in self.asking)
        return asked and self.standing.holds(root)

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x, x)
        return x


# Beside the modules, which are copied and pickled.
_known: WeakKeyDictionary[Int8Block, Known] = WeakKeyDictionary()
_widths: WeakKeyDictionary[Int8Block, tuple[Tensor, tuple, tuple[int, ...] | None]] = WeakKeyDictionary()


class Int8Block(Fused):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`: timm's `Block` with the ops `int8_attention` and `int8_chain`.

    Its attention is a `FusedAttention` and its MLP an `Int8MLP`, all of whose linears multiply bytes; queries and keys
    may have lost channels (`SelectedLinear`), which then are not even zeros. The children keep their names and are
    shared with the original module, which `back` gives back. Where somebody listens to one of them, and under a mask,
    autocast or a transform, they are called. Raises InputError with the reason of `why_not`.
    """

    MLP: ClassVar[type[Int8MLP]] = Int8MLP
    KEPT = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")

    if TYPE_CHECKING:
        norm1: nn.Module
        attn: nn.Module
        ls1: nn.Module
        drop_path1: nn.Module
        norm2: nn.Module
        mlp: nn.Module
        ls2: nn.Module
        drop_path2: nn.Module

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become an Int8Block with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        if class_of(module) not in _BLOCKS:
            return f"it is no {_BLOCKS[0]}"
        if [name for name, _ in module.named_children()] != list(cls.KEPT):
            return f"its children are not {', '.join(cls.KEPT)}"
        if module._parameters or module._buffers or has_hooks(module):
            return "it has parameters of its own, or hooks"
        found = _parts(module, cls.MLP)
        return found if isinstance(found, str) else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return self._called(x, attn_mask, is_causal)
        return self._dispatched(x, attn_mask, is_causal)

    def _called(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    @torch.jit.unused
    def _dispatched(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        masked = attn_mask is not None or is_causal
        short = not masked and unwatched(x) and not torch.is_autocast_enabled("cpu")
        known = _known.get(self) if short else None
        if known is not None and known.holds(self, x):
            return known(x)
        operands = None if masked else self._operands(x)
        if operands is None:
            return self._called(x, attn_mask, is_causal)
        steps = self._steps(x, *operands) if short else None
        if steps is None:
            return self._halves(x, *operands)
        _known[self] = known = Known.of(self, x, steps)
        return known(x)

    def ready(self, x: Tensor) -> tuple[Ready, ...] | None:
        """Both operations, for x and others of its shape and dtype; None where they cannot stand for the children."""
        operands = self._operands(x)
        return None if operands is None else self._steps(x, *operands)

    def _operands(self, x: Tensor) -> tuple[Parts, tuple[int, ...]] | None:
        """What the operations take beside x, and how narrow queries and keys are; None where they cannot run on it."""
        plain = x.dim() == 3 and not x.is_meta and not is_transformed()
        parts = _parts(self, self.MLP) if plain and not torch.is_autocast_enabled(x.device.type) else ""
        if isinstance(parts, str) or parts.norm1.gamma.dtype != x.dtype or parts.norm2.gamma.dtype != x.dtype:
            return None
        query_keys = () if parts.left is None else _query_keys(parts.left, self)
        return None if query_keys is None else (parts, query_keys)

    def _steps(self, x: Tensor, parts: Parts, query_keys: tuple[int, ...]) -> tuple[Ready, ...] | None:
        attend, feed = self._halved(x, parts, query_keys)
        first, second = int8_attention.ready(x, *attend), int8_chain.ready(x, *feed, x, parts.norm2)
        return None if first is None or second is None else (first, second)

    def _halves(self, x: Tensor, parts: Parts, query_keys: tuple[int, ...]) -> Tensor:
        attend, feed = self._halved(x, parts, query_keys)
        y = int8_attention.int8_attention(x, *attend)
        return int8_chain.int8_chain(y, feed[0], feed[1], y, parts.norm2)

    def _halved(self, x: Tensor, parts: Parts, query_keys: tuple[int, ...]) -> tuple[Any, tuple[list, list[str]]]:
        """The arguments of the operations after x; of the second one, those before its residual."""
        norm1, qkv, _, proj, _, fc1, act, fc2 = parts
        attend = (qkv, proj, self.attn.num_heads, x, norm1, query_keys)
        return attend, ([*fc1, *fc2], ["none"] * (len(fc1) - 1) + [act] + ["none"] * len(fc2))


def _parts(block: nn.Module, kind: type[Int8MLP]) -> Parts | str:
    """What the operations take of a block, or why they cannot stand for it."""
    norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2 = (block._modules[name] for name in Int8Block.KEPT)
    if type(attn) is not FusedAttention or type(mlp) is not kind:
        return f"its attention is no FusedAttention, or its MLP no {kind.__name__}"
    idle = [ls1, drop_path1, ls2, drop_path2, *(attn._modules[n] for n in ("q_norm", "k_norm", "norm", "proj_drop"))]
    if not all(child is not None and _idle(child) for child in idle):
        return "a layer scale, a drop path or a norm of its queries does something"
    first = attn._modules["qkv"]
    left: Any = None
    if type(first) is SelectedLinear and kind.KIND is Int8Linear and first.inputs is None and not has_hooks(first):
        first, left = first.linear, first.outputs
    qkv, proj, fc1, fc2 = (
        steps(linear, kind.KIND)  # type: ignore[arg-type]
        for linear in (first, attn._modules["proj"], mlp._modules["fc1"], mlp._modules["fc2"])
    )
    act = activation_name(mlp.act)
    if not (qkv and proj and fc1 and fc2 and act):
        return "a linear of it multiplies no bytes, or somebody listens to it"
    if any(has_hooks(m) for m in (norm1, attn, norm2, mlp, mlp.act)) or _has_any_global_hook():  # type: ignore[arg-type]
        return "somebody listens to its children"
    before, after = _norm(norm1), _norm(norm2)
    if before is None or after is None:
        return f"its norms are none of {', '.join(_NORMS)} with weight and bias"
    return Parts(before, qkv, left, proj, after, fc1, act, fc2)


def _query_keys(left: Tensor, block: Int8Block) -> tuple[int, ...] | None:
    """How many channels of queries, and of keys, each head of a block has of those of qkv that are left.

    None where its queries have others than its keys, or none, where a value is gone, and where nobody can read numbers.
    Counted once as long as nobody writes to them: from a GPU every look at a number would wait for all that runs there.
    """
    if torch.compiler.is_compiling() or type(left) is not Tensor:
        return None
    heads, d = int(block.attn.num_heads), int(block.attn.head_dim)  # type: ignore[arg-type]
    if left.is_inference():  # torch counts no writes to it
        return _counted(left, heads, d)
    kind, found = (left._version, heads, d), _widths.get(block)
    if found is None or found[0] is not left or found[1] != kind:
        found = _widths[block] = (left, kind, _counted(left, heads, d))
    return found[2]


def _counted(left: Tensor, heads: int, d: int) -> tuple[int, ...] | None:
    full = heads * d
    queries, keys, values = left.tensor_split(((len(left) - full) // 2, len(left) - full))
    if len(left) <= full or len(queries) != len(keys) or not torch.equal(queries + full, keys) or values[0] < 2 * full:
        return None
    counts = torch.bincount(queries // d, minlength=heads).tolist()
    return tuple(counts) if all(counts) else None


def _idle(child: nn.Module) -> bool:
    return does_nothing(child) or (type(child) is FoldedScale and not has_hooks(child))


def _norm(module: nn.Module | None) -> Norm | None:
    """The LayerNorm of the channels that a module is, if it is one."""
    if module is None or class_of(module) not in _NORMS or len(module.normalized_shape) != 1:  # type: ignore[arg-type]
        return None
    gamma, beta = module._parameters["weight"], module._parameters["bias"]
    return None if gamma is None or beta is None else Norm(gamma, beta, module.eps)  # type: ignore[arg-type]
