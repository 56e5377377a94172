"""Surgery: carry a plan out, narrow MLPs and attentions and swap linear layers for low-rank ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.anatomy.attention import Attention, attentions
from vitlr.anatomy.mlps import Mlp, find_mlps, read_mlp
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.mlp_widths import WidthSpectrum
from vitlr.decomposition.ranks import decompose
from vitlr.decomposition.score_widths import ScoreSpectrum
from vitlr.decomposition.spectra import Spectra
from vitlr.decomposition.value_widths import ValueSpectrum
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.nn._plain import has_hooks
from vitlr.planning.planner import Progress, with_widths
from vitlr.planning.plans import Plan
from vitlr.runtime.modules import swap
from vitlr.runtime.storage import fingerprint
from vitlr.surgery.attention import narrow_attention, narrow_scores
from vitlr.surgery.mlps import narrow_mlp


def replace_layers(
    model: nn.Module,
    plan: Plan,
    spectra: Spectra,
    *,
    inplace: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> nn.Module:
    """Narrow every planned MLP and attention, replace every planned layer `W` by factors `A [N, r]`, `B [r, K]`.

    A new model unless `inplace`. Where an MLP is both narrowed and factorised, its first linears keep rows of the dense
    one's A, and the second one's factors are those of its weights after compensation.

    Raises `InputError` where plan, spectra and model do not belong together; the model is then untouched.
    """
    if spectra.fingerprint != plan.fingerprint:
        raise InputError(
            f"the plan is of weights {plan.fingerprint}, the spectra of {spectra.fingerprint}; make the plan again"
        )
    modules = dict(model.named_modules())
    taken = _check_widths(model, plan)
    for row in plan.layers:
        linear, shape = modules.get(row.name), (row.out_features, row.in_features)
        if type(linear) is not nn.Linear or linear.weight.shape != shape:
            raise InputError(f"the plan is of another model: no linear {shape[0]}x{shape[1]} at {row.name!r}")
        if (row.rank is not None or row.name in taken) and has_hooks(linear):
            raise InputError(f"layer {row.name} has hooks, which would vanish with it; take them off first")
    if not inplace:
        model = copy.deepcopy(model)
    linears.make_visible(model)
    factors = _narrow(model, plan, spectra)
    for done, (name, rank) in enumerate(plan.ranks.items(), 1):
        if isinstance(model.get_submodule(name), SelectedLinear):  # of a narrowed attention
            linear, place = model.get_submodule(f"{name}.linear"), f"{name}.linear"
        else:
            linear, place = model.get_submodule(name), name
        assert isinstance(linear, nn.Linear)
        spectrum = spectra.layers[name]
        A, B, bias = factors[name] if name in factors else spectrum.factors(linear.weight, rank, linear.bias)
        low = LowRankLinear.from_factors(A, B, bias, device=linear.weight.device, dtype=linear.weight.dtype)
        swap(model, place, low.train(linear.training).requires_grad_(linear.weight.requires_grad))
        if progress is not None:
            progress(done, len(plan.ranks))
    return model


def _check_widths(model: nn.Module, plan: Plan) -> set[str]:
    """The linears that lose channels of attention; `InputError` where an MLP or attention is not as planned."""
    kinds = {row.kind for row in plan.widths if row.name in plan.narrowed}
    mlps = find_mlps(model) if "mlp" in kinds else {}
    heads = attentions(model)[0] if kinds - {"mlp"} else {}
    taken: set[str] = set()
    for row in plan.widths:
        if row.name not in plan.narrowed:
            continue
        found: Mlp | Attention | None = mlps.get(row.name) if row.kind == "mlp" else heads.get(row.name)
        if found is None or found.width != row.full_width:
            what = "MLP" if row.kind == "mlp" else "attention"
            raise InputError(f"the plan is of another model: no {what} of width {row.full_width} at {row.name!r}")
        if isinstance(found, Attention):
            taken |= set(found.queries_keys if row.kind == "scores" else found.linears)
    return taken


def _narrow(model: nn.Module, plan: Plan, spectra: Spectra) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Narrow the planned MLPs and attentions; return the factors of those of their linears that have a rank as well."""
    factors = {}
    for name, width in plan.narrowed.items():
        spectrum = spectra.widths[name]
        if isinstance(spectrum, ScoreSpectrum):
            narrow_scores(model, spectrum, width)
            continue
        assert isinstance(spectrum, WidthSpectrum)
        keep = spectrum.keep(width)
        weight, bias = spectrum.weights(width)
        rows = spectrum.rows(keep)
        for first in spectrum.first:
            if first in plan.ranks:
                linear, left = model.get_submodule(first), rows[first]
                A, B, b = spectra.layers[first].factors(linear.weight, plan.ranks[first], linear.bias)  # type: ignore[arg-type]
                factors[first] = A[left], B, None if b is None else b[left]
        if spectrum.second in plan.ranks:
            solved = spectrum.second_spectrum(width)
            factors[spectrum.second] = solved.factors(weight, plan.ranks[spectrum.second], bias)
        if isinstance(spectrum, ValueSpectrum):
            narrow_attention(model, spectrum.attention, keep, weight=weight, bias=bias)
        else:
            narrow_mlp(read_mlp(model.get_submodule(name), name), keep, weight=weight, bias=bias)
    return factors


def apply(
    model: nn.Module,
    plan: Plan,
    stats: Statistics | None = None,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Carry a plan out: a new model (the same one if `inplace`) with MLPs and attentions narrowed and
    `LowRankLinear`s as planned.

    A plan read from JSON has no spectra and needs the statistics it was made from. Raises `InputError` where plan,
    statistics and model do not belong together.
    """
    modules = dict(model.named_modules())
    weights = {row.name: module.weight for row in plan.layers if isinstance(module := modules.get(row.name), nn.Linear)}
    if len(weights) != len(plan.layers) or fingerprint(weights) != plan.fingerprint:
        raise InputError("this plan is of another model or of other weights; make the plan for the model as it is now")
    spectra = plan.spectra
    if spectra is None:
        if stats is None:
            raise InputError(
                "this plan was read from a file and carries no factors; pass the statistics it was made from"
            )
        spectra = decompose(model, stats, plan.objective, centred=plan.centred, damping=plan.damping)
        if plan.narrowed:
            how: dict[str, Any] = {"compensate": plan.compensated, "ridge": plan.ridge}
            spectra = with_widths(model, stats, spectra, plan.attention, **how)
    return replace_layers(model, plan, spectra, inplace=inplace, progress=progress)
