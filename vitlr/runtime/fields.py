"""Options as values: a field says its default, its help and its bounds once; Python and the shell read them there."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vitlr.errors import InputError
from vitlr.runtime.words import newer

O = TypeVar("O", bound="Options")  # noqa: E741 (the type of the options themselves)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """What a field allows, and how the shell asks for it."""

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    among: Sequence[Any] | None = None
    words: Mapping[str, str] | None = None  # old words for some of these, which are taken as well
    was: str | None = None  # an old name of the field, which is taken as well
    flag: str | None = None  # "" for options that only Python has; None for the field's name
    metavar: str | None = None

    def expected(self, kind: str) -> str:
        """In words, for a message."""
        if self.among is not None:
            return f"one of {', '.join(map(str, self.among))}"
        if self.above is not None and self.below is not None:
            return f"a {kind} between {_said(self.above)} and {_said(self.below)}"
        bounds = [
            f"from {_said(self.low)}" + ("" if self.high is not None else " on") if self.low is not None else "",
            f"to {_said(self.high)}" if self.high is not None else "",
            f"above {_said(self.above)}" if self.above is not None else "",
            f"below {_said(self.below)}" if self.below is not None else "",
        ]
        return " ".join([f"a {kind}", *filter(None, bounds)])

    def holds(self, value: Any) -> bool:
        """Whether a value of the right type lies within the bounds; NaN never does."""
        if self.among is not None:
            return value in self.among
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field of an `Options` class; `bounds` are those of `Option`."""
    return field(default=default, metadata={"option": Option(help, **bounds)})


@dataclass(frozen=True)
class Options:
    """Base of the options of a stage: every field is checked when it is set, and what is unknown is refused.

    A field's type decides what it takes: `int` whole numbers (numpy's too), `float` finite numbers, `bool` and `str`
    just those; with `| None` it may be left open. Any other type is checked by `check` of the class.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(
                self, item.name, _checked(item, types_of(type(self), item.name), getattr(self, item.name))
            )
        self.check()

    def check(self) -> None:
        """Raise `InputError` for values that do not go together."""

    @classmethod
    def of(cls: type[O], options: O | None = None, /, **changes: Any) -> O:
        """`options`, or the defaults, with these changes; `InputError` for names and values that it does not know."""
        check_names(changes, cls)
        changes = own(cls, changes)
        return replace(options, **changes) if options is not None else cls(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def names_of(cls: type[Options]) -> tuple[str, ...]:
    """The names of all fields."""
    return tuple(item.name for item in fields(cls))


def types_of(cls: type[Options], name: str) -> tuple[Any, ...]:
    """The types that a field takes, `NoneType` for one that may be left open."""
    hint = get_type_hints(cls)[name]
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def own(cls: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of `given` are fields of this class, old names under those of today."""
    old = {said.was: name for name, said in declared(cls).items() if said.was is not None}
    return {old.get(name, name): value for name, value in given.items() if old.get(name, name) in names_of(cls)}


def taken(cls: type[Options], given: dict[str, Any]) -> dict[str, Any]:
    """What of `given` are fields of this class, taken out of it."""
    return {name: given.pop(name) for name in names_of(cls) if name in given}


def declared(*classes: type[Options]) -> dict[str, Option]:
    """What the fields of these classes say, by name; the first to have a name says it."""
    found: dict[str, Option] = {}
    for cls in classes:
        for item in fields(cls):
            found.setdefault(item.name, item.metadata["option"])
    return found


def check_names(given: Mapping[str, Any], *classes: type[Options], more: Sequence[str] = ()) -> None:
    """Raise `InputError` for the first name that is a field of none of the classes, and none of `more`."""
    said = declared(*classes)
    known = {*said, *(option.was for option in said.values()), *more}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}, expected some of {', '.join([*said, *more])}")


def keywords(*classes: type[Options]) -> Callable[[F], F]:
    """Decorator of a function whose `**changes` are fields of these classes: its signature then names them all."""

    def named(function: F) -> F:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in kept}
        added = [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for cls in classes
            for item in fields(cls)
            if not (item.name in taken or taken.add(item.name))  # type: ignore[func-returns-value]
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return function

    return named


def _checked(item: Field[Any], kinds: tuple[Any, ...], value: Any) -> Any:
    """The value as its type; `InputError` where it is not of it, or out of bounds."""
    said: Option = item.metadata["option"]
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and said.words and said.words.get(value) in (said.among or ()):
        value = newer(value, said.words)
    for kind, word in ((bool, "true or false"), (int, "whole number"), (float, "number"), (str, "word")):
        if kind not in kinds:
            continue
        try:
            found = _READ[kind](value)
        except (TypeError, ValueError):
            found = None
        if found is not None and said.holds(found):
            return found
        if len(set(kinds) - {type(None)}) == 1:
            expected = "True or False" if kind is bool else said.expected(word)
            what = f"{item.name}={value!r}" if said.among is None else f"unknown {item.name} {value!r}"
            raise InputError(f"{what}, expected {expected}")
    return value


def _said(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _float(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    found = float(value)
    if found != found or found in (float("inf"), float("-inf")):
        raise ValueError
    return found


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_READ = {bool: _bool, int: _int, float: _float, str: _str}
