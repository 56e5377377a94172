"""How a command becomes flags and help: options of the stages taken from their fields, help in sections."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from vitlr.runtime.fields import Option, Options, types_of

KWARGS = "--model-kwargs"
PAIR = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# What Python calls by another name than its flag is called.
_ALIASES = {"loader": "--data", "rungs": "--refine"}


def takes(sections: Mapping[str, type[Options]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of these options, a section of the help each; it gets what was given as `options`.

    They stand behind the command's own flags of the same section, else in the place of its parameter `options`. Of
    fields of one name the first counts; a parameter of the command's own comes before all.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        before = inspect.signature(command, eval_str=True)
        defaults: dict[str, Any] = {}
        place = {_section(parameter): name for name, parameter in before.parameters.items()}  # the last of each section
        added: dict[str, list[inspect.Parameter]] = {}
        for title, cls in sections.items():
            for name, said, default in _own_first(cls):
                if said.flag != "" and name not in before.parameters and name not in defaults:
                    defaults[name] = default
                    flag = _parameter(title, cls, name, said, default)
                    added.setdefault(place.get(title, "options"), []).append(flag)
        shown: list[inspect.Parameter] = []
        for name, parameter in before.parameters.items():
            shown += [parameter.replace(kind=parameter.KEYWORD_ONLY)] if name != "options" else []
            shown += added.get(name, [])

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            asked = {name: given.pop(name) for name in defaults}
            options = {
                name: not defaults[name] if value is True else value
                for name, value in asked.items()
                if not (value is None or value is False or value == [])
            }
            return command(**given, options=options)

        run.__signature__ = before.replace(parameters=shown)  # type: ignore[attr-defined]
        return run

    return decorate


def _section(parameter: inspect.Parameter) -> str | None:
    """The section of the help that a parameter is shown in."""
    return next((info.rich_help_panel for info in get_args(parameter.annotation)[1:]), None)


def _own_first(cls: type[Options]) -> list[tuple[str, Option, Any]]:
    """The fields that a class adds to those that it inherits, then these."""
    found = [(item.name, item.metadata["option"], item.default) for item in fields(cls)]
    return sorted(found, key=lambda field: field[0] not in inspect.get_annotations(cls))


def _parameter(title: str, cls: type[Options], name: str, said: Option, default: Any) -> inspect.Parameter:
    """One flag, left out unless it is given."""
    kinds = types_of(cls, name)
    kind: Any = next((kind for kind in (bool, str, int, float) if kind in kinds), str)
    if any(get_args(kind) == (str,) and issubclass(kind.__origin__, Sequence) for kind in kinds):
        kind = list[str]
    help = said.help
    if default is not None and not isinstance(default, bool) and "[default" not in help:
        help += f" [default: {default:g}]" if isinstance(default, float) else f" [default: {default}]"
    flag = said.flag or f"--{name.replace('_', '-')}"
    if kind is bool:
        info = typer.Option(flag, help=help, show_default=False, rich_help_panel=title)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info])
    info = typer.Option(flag, help=help, metavar=said.metavar, show_default=False, rich_help_panel=title)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """The flag of every parameter of a command, and of what Python calls otherwise."""
    found = dict(_ALIASES)
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for info in get_args(parameter.annotation)[1:]:
            named = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str) and d.startswith("--")]
            if isinstance(info, typer.models.OptionInfo):
                found[name] = (named or [f"--{name.replace('_', '-')}"])[0].split("/")[0]
    return found


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A message with flags in place of Python's names: `rank_step=0` becomes `--rank-step 0`."""
    names = "|".join(map(re.escape, sorted(flags, key=len, reverse=True)))
    text = re.sub(rf"\bunknown ({names}) ", lambda m: f"unknown {flags[m[1]]} ", text)
    return re.sub(
        rf"(?<![\w.\[-])({names})=(?:True\b|False\b|(?=[\w'\"\[(.+-])(?P<value>)|)",
        lambda m: flags[m[1]] + ("" if m["value"] is None else " "),
        text,
    )


class Command(TyperCommand):
    """A command whose help is in sections, and that takes timm's `--model-kwargs a=1 b=2`: several values a flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _one_value_a_flag(args))

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        super().format_help_text(ctx, formatter)
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example stands above the flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or "Other"
                sections.setdefault(title, []).append(record)
        for title, records in sorted(sections.items(), key=lambda section: section[0] == "Other"):
            with formatter.section(title):
                formatter.write_dl(records)


def _one_value_a_flag(args: Sequence[str]) -> list[str]:
    spread: list[str] = []
    pairs: int | None = None  # values seen after the flag; None where no flag is open
    for arg in args:
        if pairs is not None and PAIR.fullmatch(arg):
            spread += [KWARGS, arg]
            pairs += 1
            continue
        if pairs == 0:
            spread.append(KWARGS)  # without a value: the parser says so
        pairs = 0 if arg == KWARGS else None
        if pairs is None:
            spread.append(arg)
    return [*spread, KWARGS] if pairs == 0 else spread
