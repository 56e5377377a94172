"""Flags made from fields: what the help shows first, what a command is given, what errors call things."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from vitlr.calibration.options import Calibration
from vitlr.cli.app import app
from vitlr.cli.command import Command, flags_of, in_flags, takes
from vitlr.planning.options import Planning
from vitlr.refinement.recipe import Recipe
from vitlr.runtime.fields import Options, declared, option

COMMANDS = [
    "inspect",
    "frontier",
    "compress",
    "prune",
    "finetune",
    "validate",
    "report",
    "export",
    "bench",
    "doctor",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_text_of_eighty_columns_in_sections(run, command):
    lines = run(command, "--help").out.splitlines()
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    titles = [line.rstrip(":") for line in lines if line and not line.startswith((" ", "Usage"))]
    assert len(titles) > 1 and len(titles) == len(set(titles)) and titles[-1] == "Other"
    assert sum(line.startswith("  vitlr ") for line in lines) == (command not in ("doctor", "demo"))


def test_the_first_screen_is_what_a_beginner_needs(run):
    first = "\n".join(run("compress", "--help").out.splitlines()[:24])
    assert all(f" {name} " in first for name in ("MODEL", "--budget", "--data", "--out", "--checkpoint"))


def test_every_option_of_the_stages_is_a_flag_or_only_of_python(run):
    shown = run("compress", "--help").out
    for name, said in declared(Planning, Calibration, Recipe).items():
        flag = said.flag or f"--{name.replace('_', '-')}"
        assert (f"{flag} " in shown) == (said.flag != "" or flag == "--batch-size"), flag


def test_help_waits_for_neither_torch_nor_timm():
    code = "import sys\nfrom typer.testing import CliRunner\nfrom vitlr.cli.app import app\n"
    code += f"for c in {COMMANDS}: assert CliRunner().invoke(app, [c, '--help']).exit_code == 0\n"
    code += "print([m for m in ('torch', 'timm', 'rich', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_first_help_fits_eighty_columns_and_cuts_no_sentence(run):
    lines = run("--help").out.splitlines()
    assert all(len(line) <= 80 for line in lines) and not any(line.endswith("...") for line in lines[1:])
    assert all(any(line.startswith(f"  {name} ") and line.endswith(".") for line in lines) for name in COMMANDS)


@pytest.mark.parametrize(
    "args",
    [
        ["compress", "m", "--budget", "60%", "--data", "x", "--out", "y"],
        ["compress", "m", "--budget", "params:60%", "--data", "x", "--out", "y", "--method", "jont"],
        ["compress", "m", "--budget", "params:60%", "--data", "x"],
        ["compress", "m", "--budget", "params:60%", "--out", "y"],
        ["frontier", "m", "--data", "x", "--budgets", "60%"],
        ["frontier", "m", "--data", "nowhere", "--out", "y"],
        ["frontier", "local-dir:nowhere", "--data", "."],
        ["compress", "m", "--budget", "params:60%", "--data", ".", "--out", "y", "--refine", "jump"],
        ["inspect", "nowhere.safetensors"],
        ["report", "nowhere.safetensors", "--out", "y"],
        ["export", "m", "--out", "small.pdf"],
        ["bench", "m", "--engines", "tensorrt"],
        ["demo", "--out", sys.executable],
        ["report", "m"],
        ["validate", "m"],
        ["finetune", "m"],
    ],
)
def test_usage_errors_wait_for_no_torch(args):
    code = "import sys\nfrom typer.testing import CliRunner\nfrom vitlr.cli.app import app\n"
    code += f"found = CliRunner().invoke(app, {args})\n"
    code += "print(found.exit_code, found.stderr.count(chr(10)), [m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 1 []\n"


@dataclass(frozen=True)
class Before(Options):
    base: int = option(1, "Inherited.")


@dataclass(frozen=True)
class Sample(Before):
    share: float = option(0.5, "A share.", above=0, below=1, metavar="S")
    uniform: bool = option(True, "By one budget.", flag="--allocated")
    names: tuple[str, ...] = option((), "Hidden.", flag="")
    limit: int | None = option(None, "How many.")


@pytest.fixture
def made():
    """An app of one command that takes these options, and what it was given."""
    seen: dict[str, Any] = {}

    @takes({"Sampling": Sample})
    def command(
        model: Annotated[str, typer.Argument()],
        options: Any = None,
        limit: Annotated[int, typer.Option(help="Its own.")] = 3,
    ) -> None:
        seen.update(options=options, limit=limit)

    program = typer.Typer(rich_markup_mode=None)
    program.command("command", cls=Command)(command)
    return lambda *given: (CliRunner().invoke(program, list(given)), seen), command


def test_a_command_is_given_what_was_said_and_nothing_else(made):
    run, _ = made
    assert run("m")[1] == {"options": {}, "limit": 3}
    assert run("m", "--share", "0", "--allocated", "--base", "0")[1]["options"] == {
        "share": 0.0, "uniform": False, "base": 0
    }  # fmt: skip
    assert run("m", "--limit", "9")[1] == {"options": {}, "limit": 9}
    assert run("m", "--names", "x")[0].exit_code == 2
    shown = run("--help")[0].stdout
    assert "Sampling:" in shown and "[default: 0.5]" in shown and "Hidden" not in shown
    assert shown.index("--share") < shown.index("--allocated") < shown.index("--base"), "its own fields first"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("share=1.5, expected a number", "--share 1.5, expected a number"),
        ("uniform=True goes with share='x' or 'y'", "--allocated goes with --share 'x' or 'y'"),
        ("share= or limit= was different", "--share or --limit was different"),
        ("unknown share 'all', expected", "unknown --share 'all', expected"),
        ("loader= is missing", "--data is missing"),
        ("the share of the gates, between 0 and 1", "the share of the gates, between 0 and 1"),
        ("in_share=3, names=4, --share=5", "in_share=3, names=4, --share=5"),
    ],
)
def test_errors_speak_of_flags(made, said, shown):
    assert in_flags(said, flags_of(made[1])) == shown


def test_every_flag_that_a_command_knows_is_one_that_it_has(run):
    for command in app.registered_commands:
        shown = run(command.name, "--help").out
        own = {name: flag for name, flag in flags_of(command.callback).items() if name not in ("loader", "rungs")}
        assert all(f"{flag} " in shown for flag in own.values()), command.name
