"""What the documents tell users to type, typed: every ```python and ```bash snippet of README.md and docs/."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from vitlr.checkpoint.creation import create_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 4, "embed_dim": 96}
# What a snippet may hold that is not run here, and who runs it instead.
ELSEWHERE = {
    "pip install": ".ci/run installs",
    "pytest": "this is it",
    "ruff": ".ci/run checks",
    "mypy": ".ci/run checks",
    "vitlr demo": "takes minutes; tests/test_demo.py runs it quickly",
    "vitlr frontier": "takes minutes; tests/cli/test_frontier_command.py runs it on a small model",
}
_NOTE = r"<!-- (?:not run: (?P<why>[^\n]+?)|needs: (?P<needs>[\w ]+?)) -->\n"
_FENCE = re.compile(rf"^(?:{_NOTE})?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="the documents are not beside the tests")


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Readers' ViT-Ti is four blocks of width 96 here, on one thread: what they type runs in seconds."""
    entrypoints, before = timm.models._registry._model_entrypoints, torch.get_num_threads()
    full = entrypoints[NAME]
    entrypoints[NAME] = lambda pretrained=False, **given: full(pretrained, **{**SMALL, **given})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    entrypoints[NAME] = full


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """The folder that the snippets are written for: weights, train/ and val/ images, a class map."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    save_file(create_model(NAME).state_dict(), folder / "vit_tiny.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = [f"class{i:04d}" for i in range(1000)]
    for split, classes in (("train", names[:3]), ("val", names[:2])):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((240, 230)).save(folder / split / name / "1.jpg")
    (folder / "synsets.txt").write_text("\n".join(names) + "\n")
    return folder


def snippets(document: Path) -> Iterator[tuple[str, str, str | None]]:
    for match in _FENCE.finditer(document.read_text()):
        missing = [name for name in (match["needs"] or "").split() if importlib.util.find_spec(name) is None]
        why = f"{', '.join(missing)} not installed" if missing else match["why"]
        yield match["language"], match["code"], why


def commands(code: str) -> list[str]:
    """Single commands: lines with continuations joined, `a && b` taken apart, comments off."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def run_command(command: str) -> None:
    if any(command == known or command.startswith(f"{known} ") for known in ELSEWHERE):
        return
    words = shlex.split(command)
    if words[0] == "python":
        script = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1]
        assert (ROOT / script).is_file(), f"{command}: there is no such file"
        return
    if words[0] == "torchrun":  # here it is one process; tests/test_processes.py starts several
        words = words[words.index("-m") + 1 :]
    assert words[0] == "vitlr", f"{command}: nobody runs this; teach test_docs.py to, or say who does"
    from vitlr.cli.app import app

    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{command}\nexit status {result.exit_code}\n{result.output}{result.exception!r}"
    assert result.output.strip(), f"{command}: said nothing"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run_in_order(document: Path, workplace: Path, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {"__name__": document.stem}
    for language, code, why in snippets(document):
        if why is not None:
            assert len(why) > 10, "say why it is not run"
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, str(document), "exec"), names)
        elif language == "bash":
            for command in commands(code):
                run_command(command)
    torch._dynamo.reset()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in _LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name}: no {target}"


def test_the_two_commands_of_the_readme():
    shown = [code for language, code, _ in snippets(ROOT / "README.md") if language == "bash"]
    assert any(code.startswith('pip install ".[demo]" && vitlr demo\n') for code in shown)
    assert 'pip install -e ".[test]" && pytest\n' in shown


def test_what_the_first_command_installs_draws_the_figures_of_the_lines_below_it():
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras["optional-dependencies"]["figures"]) <= set(extras["optional-dependencies"]["demo"])
