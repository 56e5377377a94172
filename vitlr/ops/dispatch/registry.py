"""Which implementation of an op runs on a shape, and why.

An op has a list of candidates. The first is its reference in plain torch, which takes every shape; kernels are
registered after it, each with one call. Among those that support the shape, pay there and have run on real hardware,
`select` takes the fastest: by times measured near that shape on that device, else by their floors where the device's
ceilings are known, else the newest. `VITLR_BACKEND=torch|triton|cuda|cpu` chooses among that back-end's candidates
alone, or says why none can: nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vitlr.errors import InputError
from vitlr.ops.dispatch import measured
from vitlr.ops.dispatch.ceilings import Ceilings, Roofline, ceilings_of

VARIABLE = "VITLR_BACKEND"


@dataclass(frozen=True)
class Prepared:
    """What a candidate makes of a call whose arguments but x and the residual stay as they are.

    `asked()`: what the environment asks for, which is to stay what it was. `kept` is what `run(x, residual)` has
    pointers to, and lives as long as this, so it is this that is called.
    """

    run: Callable[..., Any]
    asked: Callable[[], object]
    kept: Any

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return self.run(x, residual)


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op.

    `name` is the back-end, or back-end and variant: `torch`, `triton.row_block`.
    `supports(key)` is None if it can run there, else the reason why not; `key.M` is None while a graph with unknown
    rows is traced: the question is then whether it can run for some M. `run` takes the op's arguments and returns its
    result, contiguous. `ran_on` names the hardware it has been tested on: none, and it runs only where it is asked for
    by name. `worth(key)` is None if it pays there, else the reason why not. `floor(key, ceilings)` is its own best
    time in µs. `prepare`, of an op of bytes, takes what `run` does and is for calls that differ in x and residual.
    """

    name: str
    supports: Callable[[Any], str | None]
    run: Callable[..., Any]
    ran_on: tuple[str, ...] = ()
    worth: Callable[[Any], str | None] = lambda key: None
    floor: Callable[[Any, Ceilings], float | None] | None = None
    prepare: Callable[..., Prepared] | None = None

    @property
    def backend(self) -> str:
        """The name up to the first dot."""
        return self.name.partition(".")[0]


class Override(NamedTuple):
    """The environment variable that chooses among an op's candidates, the word for its values, those always known."""

    variable: str
    word: str
    known: tuple[str, ...]


BACKEND = Override(VARIABLE, "back-end", ("cpu", "cuda", "torch", "triton"))


@dataclass
class _Op:
    key_type: Any
    roofline: Callable[[Any, Ceilings | None], Roofline]
    candidates: list[Candidate]
    override: Override


_ops: dict[str, _Op] = {}
_chosen: dict[tuple, Candidate] = {}
_registered = object()  # another one whenever there are other candidates
_inside: ContextVar[str | None] = ContextVar("backend", default=None)


def register_op(
    op: str,
    key_type: Any,
    roofline: Callable[[Any, Ceilings | None], Roofline],
    reference: Candidate,
    override: Override = BACKEND,
) -> None:
    """Makes an op known. `key_type`: the NamedTuple that describes a call; its fields are `explain`'s keywords."""
    _ops[op] = _Op(key_type, roofline, [reference], override)


def register(op: str, candidate: Candidate) -> None:
    """Adds a candidate, preferred over those already there. Raises InputError for an unknown op or a name taken."""
    taken = [known.name for known in _op(op).candidates]
    if candidate.name in taken:
        raise InputError(f"{op} already has a candidate {candidate.name!r}: {', '.join(taken)}")
    _op(op).candidates.append(candidate)
    _choose_again()


def unregister(op: str, name: str) -> None:
    """Takes a candidate out again. Raises InputError for the reference or a name that is not there."""
    kernels = _op(op).candidates[1:]
    if name not in [candidate.name for candidate in kernels]:
        raise InputError(f"{op} has no kernel {name!r} to take out")
    _op(op).candidates[1:] = [candidate for candidate in kernels if candidate.name != name]
    _choose_again()


def _choose_again() -> None:
    global _registered
    _chosen.clear()
    _registered = object()


def candidates(op: str) -> tuple[Candidate, ...]:
    """The candidates of an op, the reference first."""
    return tuple(_op(op).candidates)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose among the candidates of one back-end for as long as this lasts, as `VITLR_BACKEND=name` would."""
    before = _inside.set(name)
    try:
        yield
    finally:
        _inside.reset(before)


def _wanted(override: Override) -> str | None:
    """The back-end that this context asks for, else what the op's environment variable says."""
    return (_inside.get() if override is BACKEND else None) or os.environ.get(override.variable)


def select(op: str, key: Any, wanted: str | None = None) -> Candidate:
    """The candidate that runs on `key`. Raises InputError if the one that is wanted cannot.

    `wanted`: a back-end; by default what the op's environment variable says, `VITLR_BACKEND` for all but `eigh`.
    """
    wanted = wanted or _wanted(_op(op).override)
    entry = (op, key, wanted)
    chosen = _chosen.get(entry)
    if chosen is None:
        if len(_chosen) >= 4096:  # an endless stream of shapes must not grow it for ever
            _chosen.clear()
        chosen = _chosen[entry] = _forced(op, key, wanted) if wanted else _preferred(op, key)
    return chosen


def circumstances(op: str) -> tuple[object, str | None]:
    """What `select` goes by beside the key: as long as they are equal, it chooses the same for the same key."""
    return _registered, _wanted(_op(op).override)


def constant_in_graphs(function: Callable[..., bool]) -> Callable[..., bool]:
    """Has torch.compile run the function while it traces and take the answer for a constant.

    What is registered, or set in the environment, afterwards counts from the next compilation on. The attribute is all
    that torch.compiler.assume_constant_result sets, but that imports the whole of dynamo, a second's wait at import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def has_kernels(op: str) -> bool:
    """Whether there is anything to choose: while there is not, a module need not even describe its call."""
    return len(_ops[op].candidates) > 1 or _ops[op].override.variable in os.environ


@constant_in_graphs
def kernel_chosen(op: str, *fields: Any) -> bool:
    """Whether `select` takes anything but the reference for the key of these fields."""
    entry = _ops[op]
    return select(op, entry.key_type(*fields)) is not entry.candidates[0]


def _op(op: str) -> _Op:
    if op not in _ops:
        raise InputError(f"unknown op {op!r}: known are {', '.join(sorted(_ops))}")
    return _ops[op]


def _objection(op: str, candidate: Candidate, key: Any) -> str | None:
    """Why a candidate that could run is not taken by itself; where it was measured nearby, its time speaks for it."""
    if not candidate.ran_on:
        return "compiled, not run: it never ran on real hardware"
    found = measured.nearest(op, key)
    return None if found and candidate.name in found.us else candidate.worth(key)


def _preferred(op: str, key: Any) -> Candidate:
    reference, *kernels = _op(op).candidates
    able = [c for c in reversed(kernels) if c.supports(key) is None and _objection(op, c, key) is None]
    return _fastest(op, key, [*able, reference])


def _fastest(op: str, key: Any, able: list[Candidate]) -> Candidate:
    """The one of least time, by measurement or else by floors; the first where one of them has neither."""
    if len(able) == 1:
        return able[0]
    found = measured.nearest(op, key)
    times: list[float | None] = [found.us.get(candidate.name) if found else None for candidate in able]
    limits = ceilings_of(key.device)
    if None in times and limits is not None:
        times = [_floor(candidate, key, limits) for candidate in able]
    ranked = [(time, index) for index, time in enumerate(times) if time is not None]
    return able[min(ranked)[1]] if len(ranked) == len(able) else able[0]


def _floor(candidate: Candidate, key: Any, limits: Ceilings) -> float | None:
    rows = getattr(key, "M", 0)
    return None if candidate.floor is None or rows is None else candidate.floor(key, limits)


def _forced(op: str, key: Any, wanted: str) -> Candidate:
    every, (variable, word, always) = _op(op).candidates, _op(op).override
    known = dict.fromkeys((*always, *(candidate.backend for candidate in every)))
    if wanted not in known:
        raise InputError(f"{variable}={wanted}: unknown {word}, expected one of {', '.join(known)}")
    offered = [candidate for candidate in reversed(every) if candidate.backend == wanted]
    if not offered:
        raise InputError(f"{variable}={wanted}: {op} has no such candidate, only {', '.join(c.name for c in every)}")
    reasons = {candidate.name: candidate.supports(key) for candidate in offered}
    able = [candidate for candidate in offered if reasons[candidate.name] is None]
    if not able:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise InputError(f"{variable}={wanted}: {op} cannot run here ({told})")
    # Asked for by name, an untried or slow kernel runs as well, but not in place of a good one of the same back-end.
    ranks = {candidate.name: (not candidate.ran_on, candidate.worth(key) is not None) for candidate in able}
    best = min(ranks.values())
    return _fastest(op, key, [candidate for candidate in able if ranks[candidate.name] == best])


@dataclass(frozen=True)
class Row:
    """One line of an explanation."""

    candidate: str
    runs: bool
    why: str
    floor_us: float | None
    measured_us: float | None
    ran_on: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What `select` takes for a shape and why; `str()` of it is a table."""

    op: str
    key: Any
    chosen: str
    roofline: Roofline
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.key._asdict().items())
        floor = self.roofline
        head = f"{floor.flops / 1e9:.3f} GFLOP, {floor.bytes / 1e6:.3f} MB, floor {_microseconds(floor.floor_us)}"
        cells = [("candidate", "would run", "floor", "measured", "ran on", "why")]
        for row in self.rows:
            times = (_microseconds(row.floor_us), _microseconds(row.measured_us))
            cells.append((row.candidate, "yes" if row.runs else "no", *times, ", ".join(row.ran_on), row.why))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in cells
        ]
        return "\n".join([f"{self.op}  {shape}", head, *lines])


def _microseconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} µs"


def explain(op: str, *, ceilings: Ceilings | None = None, **shape: Any) -> Explanation:
    """Why `select` takes what it takes for a shape; keywords are the fields of the op's key (M, K, N, r, dtype ...).

    Of each candidate: its floor, and the time measured nearest to that shape on that device, both in µs. `ceilings`
    replaces the ceilings of the device. Raises InputError for an unknown op or field, or one left out.
    """
    entry = _op(op)
    fields, defaults = entry.key_type._fields, entry.key_type._field_defaults
    unknown = [name for name in shape if name not in fields]
    missing = [name for name in fields if name not in shape and name not in defaults]
    if unknown or missing:
        wrong = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise InputError(f"explain({op!r}) takes {', '.join(fields)}; {'; '.join(wrong)}")
    if "device" in shape:
        shape["device"] = torch.device(shape["device"])
    key = entry.key_type(**shape)
    limits = ceilings or ceilings_of(key.device)
    chosen = select(op, key)
    found = measured.nearest(op, key)
    rows = []
    for candidate in entry.candidates:
        refusal = candidate.supports(key)
        why = refusal or _objection(op, candidate, key) or ""
        if candidate is chosen:
            wanted = _wanted(entry.override)
            why = f"chosen: {entry.override.variable}={wanted}" if wanted else "chosen"
        elif not why:
            why = f"{chosen.name} is preferred"
        floor = _floor(candidate, key, limits) if limits and refusal is None else None
        us = found.us.get(candidate.name) if found else None
        rows.append(Row(candidate.name, refusal is None, why, floor, us, candidate.ran_on))
    return Explanation(op, key, chosen.name, entry.roofline(key, limits), tuple(rows))
