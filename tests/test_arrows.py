"""The house: wings import only what lies below them, and no files import each other in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vitlr

ROOT = Path(vitlr.__file__).parent

# From the ground up; a wing may import those before it. CONTRIBUTING.md says what lives in each.
WINGS = (
    "errors",
    "runtime",
    "data",
    "ops.dispatch",
    "ops.layers",
    "ops.linalg",
    "ops.backends",
    "ops",
    "nn",
    "anatomy",
    "measuring",
    "calibration",
    "decomposition",
    "planning",
    "surgery",
    "training",
    "refinement",
    "pruning",
    "checkpoint",
    "engines",
    "compression",
    "reporting",
    "cli",
)

FORMER = {"losses": "measuring.losses"}  # places that scripts import from, and where what they name lives


def modules() -> dict[str, Path]:
    """Every module by its dotted name without `vitlr.`; the package's own two are none."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)
        # triton_kernels is a package of its own, which imports nothing of ours
        if name and parts[0] != "triton_kernels" and name not in FORMER:
            found[name] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports anywhere in it, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    own = {name.removeprefix("vitlr.") for name in names if name.startswith("vitlr.")} & known.keys()
    # `from vitlr.a import b` of a module b is an arrow to b, not to what its package re-exports.
    return {name for name in own if not any(other.startswith(f"{name}.") for other in own)}


def wing(module: str) -> str:
    """The wing that a module lives in: the longest that its name begins with."""
    return max((w for w in WINGS if module == w or module.startswith(f"{w}.")), key=len)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(path, known) - {name} for name, path in known.items()}


def test_every_module_lives_in_a_wing(arrows):
    assert all(any(name == w or name.startswith(f"{w}.") for w in WINGS) for name in arrows)


def test_wings_import_only_what_lies_below(arrows):
    upward = {
        f"{name} -> {other}"
        for name, others in sorted(arrows.items())
        for other in sorted(others)
        if WINGS.index(wing(other)) > WINGS.index(wing(name))
    }
    assert not upward, f"imports that climb: {', '.join(sorted(upward))}"


@pytest.mark.parametrize("former", FORMER)
def test_a_former_place_holds_nothing_of_its_own_and_nobody_here_goes_there(former, arrows):
    _, *body = ast.parse((ROOT / f"{former}.py").read_text()).body
    assert [type(node) for node in body] == [ast.ImportFrom, ast.Assign] and body[0].module == f"vitlr.{FORMER[former]}"
    assert not any(f"vitlr.{former} " in path.read_text() for path in modules().values())


def test_no_files_import_each_other_in_a_circle(arrows):
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as cause:
        pytest.fail("a circle: " + " -> ".join(cause.args[1]))


def test_the_package_itself_imports_nothing_heavy():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} == {"importlib"}


def test_the_map_names_what_is_there():
    """CONTRIBUTING.md says in which file to look for what, and which wing lies on which."""
    page = ROOT.parent / "CONTRIBUTING.md"
    if not page.is_file():
        pytest.skip("CONTRIBUTING.md is not beside the package")
    text = page.read_text()
    named = re.findall(r"`vitlr/([\w/]+\.py)`: `(\w+)`", text)
    assert len(named) > 20
    for path, symbol in named:
        top = ast.parse((ROOT / path).read_text()).body
        stored = {name.id for node in top for name in ast.walk(node) if isinstance(name, ast.Name)}
        assert symbol in stored | {getattr(node, "name", None) for node in top}, f"{path} has no {symbol}"
    drawn = re.search(r"^    cli -> .*\n( .*\n)*", text, re.MULTILINE)[0]
    wings = list(dict.fromkeys(name.partition(".")[0] for name in reversed(WINGS)))
    assert re.findall(r"\w+", drawn) == wings
