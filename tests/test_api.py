"""`docs/api.md` says what every public name is, from its docstring, and every option, from its field.

Run as a program it writes the page anew.
"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import vitlr
from vitlr.calibration.options import Calibration
from vitlr.compression import compressed
from vitlr.data.options import Preprocessing
from vitlr.planning.options import Planning
from vitlr.pruning.options import Blending, Gating
from vitlr.refinement.recipe import Recipe
from vitlr.training.recipe import TrainRecipe

PATH = Path(__file__).resolve().parents[1] / "docs" / "api.md"
ORDER = {
    "Models and files": ("create_model", "from_pretrained", "load", "save", "save_pretrained", "push_to_hub"),
    "From images to a small model": ("compress", "calibrate", "decompose", "plan", "apply"),
    "Repair and training": ("refine", "prune", "hybrid"),
    "Running it": ("fuse", "unfuse", "to_dense", "export"),
    "What it costs and how right it is": ("evaluate", "frontier", "report"),
    "Values": ("Budget", "parse_budget", "Statistics", "Spectra", "Plan", "Frontier"),
    "Layers": (
        "LowRankLinear",
        "SelectedLinear",
        "QuantizedLinear",
        "Int8Linear",
        "ResidualLowRankLinear",
        "LowRankMLP",
        "LowRankGLU",
    ),
    "Errors": ("VitlrError", "InputError", "RunError", "NumericalError"),
}
OPTIONS = (
    (Calibration, "`calibrate` and `compress`"),
    (Planning, "`plan` and `compress`"),
    (Recipe, "`refine` and `compress`"),
    (Preprocessing, "`vitlr.data.open_data`"),
    (Gating, "`prune`"),
    (Blending, "`hybrid`"),
    (TrainRecipe, "`recipe=` of `prune`, `hybrid` and `vitlr.training.train`"),
)
HEAD = """# Every public name

Made from docstrings by `python tests/test_api.py`; [the guide](guide.md) says how they go together. `**options` are the
fields in the tables at the end, given by name, or as one value of their class.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in ORDER.items():
        parts += [f"## {title}\n", *(entry(name, getattr(vitlr, name)) for name in names)]
    parts.append("## Options\n")
    parts += [table(cls, whose) for cls, whose in OPTIONS]
    return "\n".join(parts)


def entry(name: str, what: Any) -> str:
    """A name with what it takes and what it is."""
    said = compressed if name == "compress" else what  # its model alone, from the same arguments
    lines = [f"### {name}\n", inspect.cleandoc(said.__doc__), ""]
    if not isinstance(what, type):
        lines[1:1] = [f"```text\n{call(name, said, inspect.signature(what).return_annotation)}\n```\n"]
        return "\n".join(lines)
    members = [(key, member) for key, member in vars(what).items() if not key.startswith("_")]
    said = [(key, getattr(getattr(member, "__func__", member), "__doc__", None)) for key, member in members]
    shown = [
        f"- `{key}`: {' '.join(doc.split(chr(10) * 2)[0].split())}"
        for (key, doc), (_, member) in zip(said, members, strict=True)
        if doc and (callable(getattr(member, "__func__", member)) or isinstance(member, property))
    ]
    return "\n".join([*lines, *shown, ""] if shown else lines)


def call(name: str, function: Any, gives: Any) -> str:
    """The call by its own parameters, a line each where they are many; options of a stage as `**options`."""
    code = inspect.unwrap(function).__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name in own]
    taken = [f"{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}") for p in parameters]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        taken.insert(first, "*")
    if len(parameters) < len(signature.parameters):
        more = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "options")
        taken.append(f"**{more}")
    flat = f"{name}({', '.join(taken)}) -> {gives}"
    if len(flat) <= 100:
        return flat
    lines = "".join(f"    {one},\n" for one in taken)
    return f"{name}(\n{lines}) -> {gives}"


def table(cls: type, whose: str) -> str:
    """The fields of one class of options."""
    rows = []
    for item in fields(cls):
        default = "" if item.default is MISSING else f"{item.default!r}"
        help = " ".join(item.metadata["option"].help.split()).replace("|", "\\|")
        rows.append(f"| `{item.name}` | `{default}` | {help} |")
    head = [f"### {cls.__name__}: {whose}\n", f"{inspect.cleandoc(cls.__doc__)}\n"]
    return "\n".join([*head, "| option | default | what it says |", "|---|---|---|", *rows, ""])


def test_the_page_is_what_the_docstrings_say():
    if not PATH.parent.is_dir():
        pytest.skip("the documents are not beside the tests")
    assert PATH.read_text() == page(), "python tests/test_api.py writes it anew"


def test_every_public_name_has_its_place():
    placed = [name for names in ORDER.values() for name in names]
    assert sorted(placed) == vitlr.__all__


if __name__ == "__main__":
    PATH.write_text(page())
