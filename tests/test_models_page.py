"""docs/models.md says what is so: it is made of its figures, and families tried again give the same rows."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
models = pytest.importorskip("bench.models", reason="bench/ is not beside the tests")
from bench.families import families  # noqa: E402

pytestmark = pytest.mark.skipif(not models.PAGE.is_file(), reason="the documents are not beside the tests")
AGAIN = ["timm/DINOv2", "timm/EVA02, base", "timm/PVTv2", "by hand/nn.TransformerEncoder", "torchvision/Swin"]
LIBRARIES = ("timm", "transformers", "torchvision", "open_clip", "by hand")


def rows():
    return json.loads(models.RESULTS.read_text())["rows"]


def test_the_page_is_made_of_its_figures():
    assert models.PAGE.read_text() == models.page(rows())


def test_rows_are_of_families_that_there_are_and_every_library_has_some():
    found = {name for name in rows() if name.partition("/")[0] in {known.partition("/")[0] for known in families()}}
    assert found <= set(families()) and len(rows()) >= 60
    assert {name.partition("/")[0] for name in rows()} == set(LIBRARIES)


@pytest.mark.parametrize("name", AGAIN)
def test_a_family_tried_again_gives_the_same_row(name, tmp_path):
    found = families()
    if name not in found:
        pytest.skip(f"the library of {name} is not installed")
    said = rows()[name]
    tried = models.trial(found[name], tmp_path, quick=True)
    assert tried == {key: said[key] for key in tried} and set(tried) == set(said) - set(models.SLOW)


def test_reasons_are_numbered_once_and_pointed_to():
    table = {"a": {"reach": ["no", "why"]}, "b": {"reach": ["9 %", "other", "why"], "lowrank": ["yes"]}}
    page = models.page(table)
    assert "| a | no (1) |" in page and "| b | 9 % (2, 1) | yes |" in page
    assert page.endswith("1. why\n2. other\n")
