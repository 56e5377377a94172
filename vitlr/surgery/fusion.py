"""Fuse MLPs and attentions into one module each, fold what stands beside them, and take both back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.anatomy.attention import fewer_heads
from vitlr.anatomy.mlps import narrowed_mlps
from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError
from vitlr.nn import (
    FoldedScale,
    Fp8Block,
    Fp8Linear,
    Fp8MLP,
    FusedAttention,
    FusedBiasedAttention,
    FusedPatches,
    FusedProjections,
    FusedRotaryAttention,
    Int8Block,
    Int8Blocks,
    Int8Linear,
    Int8MLP,
    LowRankGLU,
    LowRankLinear,
    LowRankMLP,
    NamedLowRankMLP,
    QuantizedLinear,
    ResidualLowRankLinear,
    SelectedLinear,
)
from vitlr.nn._fused import Fused, StandIn
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import swap, uncompiled
from vitlr.runtime.progress import Progress
from vitlr.surgery import folding
from vitlr.surgery.alien import unguard
from vitlr.surgery.bytes import multiply_bytes, multiply_fp8, multiply_tokens
from vitlr.surgery.mlps import widen_mlp

_SWAPPED = (LowRankLinear, ResidualLowRankLinear, SelectedLinear, QuantizedLinear, Int8Linear, Fp8Linear)
FUSED: tuple[type[Fused] | type[FusedPatches], ...] = (
    Int8MLP,
    Fp8MLP,
    LowRankMLP,
    NamedLowRankMLP,
    LowRankGLU,
    FusedAttention,
    FusedRotaryAttention,
    FusedProjections,
    FusedBiasedAttention,
    Int8Block,
    Int8Blocks,
    Fp8Block,
    FusedPatches,
)


def to_dense(model: nn.Module, *, full_width: bool = False, inplace: bool = False) -> nn.Module:
    """Multiply all factors out, `W = A B` or `A B + R`, and all steps: the same function on plain `nn.Linear`s.

    Channels that were taken out of a layer (`SelectedLinear`) come back as zeros, and with `full_width` hidden neurons
    too: the shapes are then those of the architecture, so that timm and others open the weights by its name. Raises
    `InputError` where that cannot be, because whole heads are gone.
    """
    if full_width and (gone := fewer_heads(model)):
        raise InputError(
            f"{next(iter(gone))} lost whole heads, which have no zeros to come back as; use full_width=False"
        )
    model = unfuse(model, inplace=inplace)
    for name, module in reversed(list(model.named_modules())):  # what a SelectedLinear holds before itself
        if isinstance(module, _SWAPPED):
            swap(model, name, module.to_linear().train(module.training))
    if full_width:
        visibility.make_visible(model)
        for mlp in narrowed_mlps(model).values():
            widen_mlp(mlp)
    visibility.put_back(model)
    unguard(model)
    return model


def fused(module: nn.Module) -> StandIn:
    """The fused module that stands for an MLP, an attention, a block or patches.

    Raises `InputError` with all reasons where none can.
    """
    reasons = {kind: kind.why_not(module) for kind in FUSED}
    for kind, reason in reasons.items():
        if reason is None:
            return kind(module)
    raise InputError("; ".join(f"no {kind.__name__}: {reason}" for kind, reason in reasons.items()))


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    fold: bool = True,
    bits: int | str | None = None,
    stats: Statistics | None = None,
    scales: str = "static",
    progress: Progress | None = None,
) -> nn.Module:
    """Gather every MLP with a low-rank layer, and attention, into one module each; `unfuse` takes it back.

    Only where that is exact: plain MLPs become a `LowRankMLP` (by other names than timm's a `NamedLowRankMLP`), gated
    ones a `LowRankGLU`, timm's attention a `FusedAttention`, where it rotates queries and keys a
    `FusedRotaryAttention`, transformers' a `FusedProjections`, and one under a bias of positions (Swin, BEiT, SAM) a
    `FusedBiasedAttention`; a convolution of patches that lie side by side becomes a `FusedPatches`. With `fold`, norms
    and layer scales beside low-rank layers are multiplied into their factors (`vitlr.folding`): the same function up to
    one rounding of the factors, which stays so after `unfuse`.
    `bits=8`: linears multiply bytes from then on (`Int8Linear`, and MLPs of them an `Int8MLP`), in the ranges that
    `stats`, measured of this very model with `extras=("ranges",)`, saw; that is not exact, and `unfuse` leaves it so.
    timm's blocks in which all linears do become an `Int8Block`, and such blocks in sequence an `Int8Blocks`. With
    `scales="token"` every token's bytes go by its own range (`TokenInt8Linear`): nothing is cut off, `stats` may be
    left out, and codes of rounded weights stay as they are; slower, as nothing between two linears is bytes.
    `bits="fp8"`: linears multiply floats of 8 bits (`Fp8Linear`, `Fp8MLP`, `Fp8Block`), whose scales need no
    statistics; for GPUs that multiply e4m3, plain torch elsewhere. Such a model is for running: files hold none. With
    `stats`, measured of this very model with `extras=("rounding",)`, weights are rounded so that the loss moves least.
    `progress(layers done, layers)` is called after each layer whose steps were found.
    Raises `InputError` for other bits and scales, and for statistics that are missing or of other weights.
    """
    if bits not in (None, 8, "fp8"):
        raise InputError(f"bits={bits!r}: expected 8, 'fp8', or None for layers as they are")
    if scales not in ("static", "token"):
        raise InputError(f"scales={scales!r}: expected 'static', ranges that calibration saw, or 'token'")
    if scales == "token" and bits != 8:
        raise InputError(f"scales='token' goes with bits=8, not with bits={bits!r}")
    if (bits == 8 and stats is None and scales == "static") or (bits is None and stats is not None):
        raise InputError("bits=8 and stats= go together: the ranges that inputs were seen in, and what they are for")
    model = uncompiled(model)
    model = model if inplace else duplicate(model)
    if bits is not None:
        unfuse(model, inplace=True)
    if bits == "fp8":
        multiply_fp8(model, stats, progress)
    elif stats is not None:
        multiply_bytes(model, stats, progress, by_token=scales == "token")
    elif bits is not None:
        multiply_tokens(model)
    _gather(model)
    if fold:
        folding.fold(model)
    _gather(model)  # blocks, of what was fused and folded
    return model


def _gather(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):  # blocks after what they hold, and then their sequence
        if name and any(kind.why_not(module) is None for kind in FUSED):
            swap(model, name, fused(module))


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give every fused module and folded layer scale back its original module, with the weights it has now."""
    model = uncompiled(model)
    model = model if inplace else duplicate(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, StandIn):
            swap(model, name, module.back())
    return model


def fused_names(model: nn.Module) -> list[str]:
    """Names of the MLPs, attentions and blocks that are fused and of the layer scales that are folded."""
    return [name for name, module in model.named_modules() if isinstance(module, StandIn)]


def fuse_again(model: nn.Module, names: Iterable[str]) -> None:
    """Fuse what `fused_names` named in a model of the same structure, whatever its weights, in place.

    Raises `InputError` for a module that cannot be fused.
    """
    for name in reversed(list(names)):  # a block after what it holds
        module = dict(model.named_modules()).get(name)
        try:
            if module is None or not name:
                raise InputError("there is no such module")
            swap(model, name, FoldedScale(module) if linears.is_scale(module) else fused(module))
        except InputError as cause:
            raise InputError(f"it fuses {name!r}, which cannot be: {cause}") from cause
