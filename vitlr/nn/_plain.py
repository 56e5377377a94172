"""When a fused op may read a child's weights instead of calling the child."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from vitlr.ops.dispatch.registry import constant_in_graphs


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, or has replaced its forward.

    Not counted is what transformers puts on layers and attentions of every model that was once asked for its hidden
    states: it stays there, and writes down only what is asked for.
    """
    return bool(
        any(not _writes_down(hook) for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _writes_down(hook: object) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def does_nothing(child: nn.Module) -> bool:
    """Whether a module passes on what it gets, in training too."""
    if has_hooks(child):
        return False
    return type(child) is nn.Identity or (type(child) is nn.Dropout and child.p == 0)


def is_plain(module: nn.Module) -> bool:
    """Whether calling this linear is exactly `F.linear(x, module.weight, module.bias)` and nobody would notice.

    An adapter, a quantiser, a parametrisation or a sharding changes the class of the module or of its weight;
    a profiler or a calibration hooks the module, or all modules.
    """
    if type(module) is not nn.Linear or has_hooks(module) or _has_any_global_hook():
        return False
    return foreign_weight(module) is None


def foreign_weight(module: nn.Module) -> str | None:
    """The class of the first parameter inside that is no plain tensor, a quantiser's for one; None where all are.

    Quantised activations are rounded by what they are: a last bit that a kernel sums otherwise flips some of them, and
    from layer to layer more, up to the size of the quantisation error itself (docs/measured.md).
    """
    for parameter in module.parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            return type(parameter).__name__
    return None


def is_transformed() -> bool:
    """Whether the model is being exported, traced or transformed by torch.func.

    An exported graph has to speak of plain linears only, and torch.func does not differentiate a registered op.
    """
    return _is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


@constant_in_graphs
def _is_exporting() -> bool:
    # Read by Python, not by dynamo: that of torch 2.9 answers True in every torch.compile.
    return torch.compiler.is_exporting()
