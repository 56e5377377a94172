"""Surgery: carry a plan out, narrow MLPs and attentions and swap linear layers for low-rank ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from vitlr.anatomy import visibility
from vitlr.anatomy.attention import Attention, attentions
from vitlr.anatomy.mlps import Mlp, find_mlps, read_mlp
from vitlr.anatomy.reading import read
from vitlr.calibration.statistics import Statistics
from vitlr.data.batches import noise_image
from vitlr.decomposition.mlp_widths import MlpSpectrum
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import RIDGE, Decomposition
from vitlr.decomposition.query_key_widths import QueryKeySpectrum
from vitlr.decomposition.solving import solve
from vitlr.decomposition.spectra import Spectra
from vitlr.decomposition.value_widths import ValueSpectrum
from vitlr.errors import InputError, NumericalError
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.nn._plain import has_hooks
from vitlr.planning.plans import Plan
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import swap, uncompiled
from vitlr.runtime.progress import Progress, shows
from vitlr.runtime.storage import fingerprint
from vitlr.surgery.alien import guard
from vitlr.surgery.attention import narrow_attention, narrow_query_keys
from vitlr.surgery.mlps import narrow_mlp
from vitlr.surgery.proof import prove
from vitlr.surgery.rounding import round_weights

Factors = tuple[Tensor, Tensor, Tensor | None]  # A [N, r], B [r, K], bias [N]


def replace_layers(
    model: nn.Module,
    plan: Plan,
    spectra: Spectra,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Narrow every planned MLP and attention, replace every planned layer `W` by factors `A [N, r]`, `B [r, K]`.

    Or by integers, where its plan says a level.

    A new model unless `inplace`. Where an MLP is both narrowed and factorised, its first linears keep rows of the dense
    one's A, and the second one's factors are those of its weights after compensation.

    Raises `InputError` where plan, spectra and model do not belong together; the model is then untouched.
    """
    if spectra.fingerprint != plan.fingerprint:
        raise InputError(
            f"the plan is of weights {plan.fingerprint}, the spectra of {spectra.fingerprint}; make the plan again"
        )
    with visibility.visible(model, keep=inplace):
        _check(model, plan)
        model = model if inplace else duplicate(model)
    factors = _narrow(model, plan, spectra)
    for done, (name, rank) in enumerate(plan.ranks.items(), 1):
        place = f"{name}.linear" if isinstance(model.get_submodule(name), SelectedLinear) else name  # of an attention
        linear = model.get_submodule(place)
        assert isinstance(linear, nn.Linear)
        A, B, bias = factors.get(name) or spectra.layers[name].factors(linear.weight, rank, linear.bias)
        low = LowRankLinear.from_factors(A, B, bias, device=linear.weight.device, dtype=linear.weight.dtype)
        low.train(linear.training).requires_grad_(linear.weight.requires_grad)
        if low.up.bias is not None and linear.bias is not None:
            low.up.bias.requires_grad_(linear.bias.requires_grad)
        swap(model, place, low)
        if progress is not None:
            progress(done, len(plan.ranks))
    round_weights(model, plan, spectra, progress)
    visibility.put_back(model)
    return model


def _check(model: nn.Module, plan: Plan) -> None:
    """`InputError` where a layer, MLP or attention is not as planned, or has hooks."""
    modules = dict(model.named_modules())
    taken = _check_widths(model, plan)
    for row in plan.layers:
        linear, shape = modules.get(row.name), (row.out_features, row.in_features)
        if type(linear) is not nn.Linear or linear.weight.shape != shape:
            raise InputError(f"the plan is of another model: no linear {shape[0]}x{shape[1]} at {row.name!r}")
        changed = row.rank is not None or row.level is not None or row.name in taken
        if changed and has_hooks(linear):
            raise InputError(f"layer {row.name} has hooks, which would vanish with it; take them off first")


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
            taken |= set(found.queries_keys if row.kind == "query_keys" else found.linears)
    return taken


def _narrow(model: nn.Module, plan: Plan, spectra: Spectra) -> dict[str, Factors]:
    """Narrow the planned MLPs and attentions; return the factors of those of their linears that have a rank as well."""
    factors: dict[str, Factors] = {}
    for name, width in plan.narrowed.items():
        spectrum = spectra.widths[name]
        if isinstance(spectrum, QueryKeySpectrum):
            narrow_query_keys(model, spectrum, width)
            continue
        assert isinstance(spectrum, (MlpSpectrum, ValueSpectrum))
        keep, (weight, bias) = spectrum.keep(width), spectrum.weights(width)
        for first, rows in spectrum.rows(keep).items():
            if first in plan.ranks:
                linear = model.get_submodule(first)
                A, B, b = spectra.layers[first].factors(linear.weight, plan.ranks[first], linear.bias)  # type: ignore[arg-type]
                factors[first] = A[rows], B, None if b is None else b[rows]
        if spectrum.second in plan.ranks:
            second = spectrum.second_spectrum(width, weight)
            factors[spectrum.second] = second.factors(weight, plan.ranks[spectrum.second], bias)
        if isinstance(spectrum, ValueSpectrum):
            narrow_attention(model, spectrum.attention, keep, weight=weight, bias=bias)
        else:
            narrow_mlp(read_mlp(model.get_submodule(name), name), keep, weight=weight, bias=bias)
    return factors


@shows("applying", "layers")
def apply(
    model: nn.Module,
    plan: Plan,
    stats: Statistics | None = None,
    *,
    measure: Callable[[nn.Module], Statistics] | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Carry a plan out: a new model (the same one if `inplace`) with MLPs and attentions narrowed and
    `LowRankLinear`s or `QuantizedLinear`s as planned.

    Layers that the plan has multiply bytes (`Plan.bytes_layers`) stay floats: the ranges of their inputs are those of
    the model that comes out here, and are measured of it (`promises.multiply_planned`; `vitlr.compress` does so).

    A plan read from JSON has no spectra and needs the statistics it was made from, or `measure(model)`, which collects
    them where there are none. A plan of several rounds needs `measure`: each round is from statistics of the model as
    the one before left it, and `stats` are the first one's. A run on one image of noise proves
    that what is new is called and counts. Raises `InputError` where plan, statistics and model do not belong together,
    where the model cannot be copied, and where the proof fails.
    """
    model = uncompiled(model)
    first = (*plan.earlier, plan)[0]
    if _fingerprint(model, first) != first.fingerprint:
        raise InputError("this plan is of another model or of other weights; make the plan for the model as it is now")
    if plan.earlier:
        return _in_rounds(model, plan, stats, measure, inplace, progress)
    spectra = plan.spectra
    if spectra is None:
        stats = measure(model) if stats is None and measure is not None else stats
        if stats is None:
            raise InputError(
                "this plan was read from a file and carries no factors; pass the statistics it was made from"
            )
        spectra = _solved_again(model, plan, stats)
    small = replace_layers(model, plan, spectra, inplace=inplace, progress=progress)
    image = plan.image or (None if stats is None else stats.image)
    if image is not None:
        changed = [row.name for row in plan.layers if row.rank or row.kept_in or row.kept_out or row.level is not None]
        with visibility.visible(small):  # 1x1 convolutions that only lost channels are convolutions again
            prove(small, changed, noise_image(small, image), original=None if inplace else model)
        small.vitlr_info = {**(getattr(small, "vitlr_info", None) or {}), "image": image}  # type: ignore[assignment]
    if plan.changes:
        guard(small)
    return small


def _in_rounds(
    model: nn.Module,
    plan: Plan,
    stats: Statistics | None,
    measure: Callable[[nn.Module], Statistics] | None,
    inplace: bool,
    progress: Progress | None,
) -> nn.Module:
    """The rounds one after the other."""
    if measure is None:
        raise InputError(
            f"this plan has {len(plan.earlier) + 1} rounds, each from statistics of the model as the one before left "
            "it; pass measure=, such as lambda network: vitlr.calibrate(network, images, hidden=True)"
        )
    for done, part in enumerate((*plan.earlier, replace(plan, earlier=(), spectra=None))):
        if done:  # what another machine makes of the round before differs in last bits
            part = replace(part, fingerprint=_fingerprint(model, part) or part.fingerprint)
        model = apply(model, part, stats, measure=measure, inplace=inplace, progress=progress)
        stats, inplace = None, True
    return model


def _fingerprint(model: nn.Module, plan: Plan) -> str | None:
    """Of the weights of the layers that a plan speaks of, as they are; None where a layer is not there."""
    with visibility.visible(model):
        held = dict(model.named_modules())
        weights = {row.name: layer.weight for row in plan.layers if isinstance(layer := held.get(row.name), nn.Linear)}
        return fingerprint(weights) if len(weights) == len(plan.layers) else None


@visibility.seeing
def _solved_again(model: nn.Module, plan: Plan, stats: Statistics) -> Spectra:
    """The spectra that a plan was made from."""
    options = Decomposition(
        objective=plan.objective,
        centred=plan.centred,
        damping=plan.damping,
        compensate=plan.compensated,
        ridge=plan.ridge or RIDGE,
    )
    kinds = ({row.kind for row in plan.widths} if plan.narrowed else set()) | ({"rounding"} if plan.levels else set())
    failed: list[NumericalError] = []  # the plan may have left these out
    spectra = solve(read(model), stats, Objective.of(stats, options), sorted(kinds), options, skip=failed.append)
    if failed and not plan.narrowed.keys() <= spectra.widths.keys():
        raise failed[0]
    return spectra
