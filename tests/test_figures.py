"""Figures in the documents that a benchmark has left as JSON: equal to it, to the digits shown."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, MEASURED = ROOT / "README.md", ROOT / "docs" / "measured.md"
BUDGETS = [f"params:{share}%" for share in (90, 80, 70, 60, 50)]
METHODS = {
    "plain SVD, uniform ranks": ("svd", "uniform"),
    "ASVD, uniform": ("asvd", "uniform"),
    "FWSVD, uniform": ("fwsvd", "uniform"),
    "SVD-LLM, uniform": ("svd_llm", "uniform"),
    "AFM, uniform": ("afm", "uniform"),
    "vitlr, objective of 2402.06004, uniform": ("vitlr-normalized", "uniform"),
    "vitlr, loss, uniform": ("vitlr-loss", "uniform"),
    "vitlr, loss, allocated": ("vitlr-loss", "allocated"),
}
WIDTHS = {
    "widths, nothing made up for": "prune-alone",
    "widths, compensated": "prune",
    "vitlr, hidden widths, compensated": "prune",
    "hybrid: widths for MLPs, ranks for attention, one knapsack": "hybrid",
    "joint, queries and keys whole": "joint-scores-kept",
    "vitlr, ranks and widths together": "joint-scores-kept",
}
FISHER = {
    "vitlr, fisher: ranks": "lowrank",
    "vitlr, fisher: ranks and widths": "joint",
    "ranks, fisher": "lowrank",
    "joint, fisher, queries and keys whole": "joint-scores-kept",
    "joint, fisher": "joint",
}

pytestmark = pytest.mark.skipif(not README.is_file(), reason="the documents are not beside the tests")


def results(path: str) -> Any:
    body = json.loads((ROOT / path).read_text())
    return body.get("results", body)


def rows(document: Path) -> dict[str, list[str]]:
    """The lines of all tables by their first cell, without what makes cells bold and what stands in brackets."""
    lines = [line for line in document.read_text().splitlines() if line.startswith("|")]
    cells = [[re.sub(r"\*\*| \(.*?\)|`", "", cell).strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def shown(found: list[dict[str, Any]], **wanted: str) -> list[str]:
    """Top-1 at every budget, as a table shows it; empty where there is none."""
    of = {row["budget"]: row["top1"] for row in found if all(row[key] == value for key, value in wanted.items())}
    return [f"{of[budget]:.1f}" if budget in of else "" for budget in BUDGETS]


@pytest.mark.parametrize("document", [README, MEASURED], ids=lambda path: path.name)
def test_methods(document):
    table, found = rows(document), results("docs/results/compare_methods.json")["rows"]
    for name, (method, allocation) in METHODS.items():
        assert table[name] == shown(found, method=method, allocation=allocation), name


@pytest.mark.parametrize("document", [README, MEASURED], ids=lambda path: path.name)
def test_widths(document):
    table = rows(document)
    for path, names in (("compare_pruning", WIDTHS), ("compare_pruning_fisher", FISHER)):
        found = results(f"docs/results/{path}.json")["rows"]
        named = {name: method for name, method in names.items() if name in table}
        assert set(named.values()) >= {"joint" if names is FISHER else "joint-scores-kept"}
        for name, method in named.items():
            cells = shown(found, method=method)
            assert table[name][: len(BUDGETS)] == cells[: len(table[name])], name


def test_the_papers_are_beaten_by_what_is_said():
    found = [row for row in results("docs/results/compare_methods.json")["rows"] if row["budget"] == "params:80%"]
    ours = max(row["top1"] for row in found if (row["method"], row["allocation"]) == ("vitlr-loss", "allocated"))
    theirs = {row["method"]: row["top1"] for row in found if row["allocation"] == "uniform"}
    best = max(theirs[name] for name in ("svd", "asvd", "fwsvd", "svd_llm", "afm"))
    assert f"lies {ours - best:.1f} points above the" in MEASURED.read_text()


def test_calibration_and_solving():
    table, said = rows(MEASURED), rows(README)
    found = results("bench/results/calibrate.json")
    for name, key in (
        ("forward passes", "forward"),
        ('calibrate(objective="output")', "calibrate output"),
        ("forward and backward passes, inputs' gradients only", "forward+backward"),
        ('calibrate(objective="loss")', "calibrate loss"),
    ):
        assert table[name][0] == f"{found['seconds'][key]:.2f}", name
    pairs = (("output", "calibrate output / forward"), ("loss", "calibrate loss / forward+backward"))
    ratios = [f"{found[key]['ratio']:.2f}" for _, key in pairs]
    assert [table[f'calibrate(objective="{name}")'][1] for name, _ in pairs] == ratios
    calibrating = "calibrating ViT-B, activations only / with gradients"
    assert said[calibrating][0] == f"{' / '.join(ratios)} times the time"

    found = results("bench/results/decompose.json")
    for name, objective in (("decompose, objective output", "output"), ("decompose, objective loss", "loss")):
        ratios = [found[f"chain / {objective}"]["ratio"], found[f"{objective} / eigh"]["ratio"]]
        wanted = [f"{value:.2f}" for value in (found["seconds"][f"decompose {objective}"], *ratios)]
        assert [cell.split(" times")[0] for cell in table[name]] == wanted
    solving = "solving all layers of ViT-B for all ranks, float64"
    assert said[solving][0] == f"{found['chain / loss']['ratio']:.1f} times faster"


def test_calibration_of_large_models():
    table, measured = rows(ROOT / "docs" / "scale.md"), results("bench/results/calibrate_fisher.json")
    seconds = measured["seconds"]["calibrate fisher, hidden"] / measured["images"]
    found = {row["model"]: row for row in results("bench/results/scale.json")["rows"]}
    for name, key in (
        ("ViT-B/16", "vit_base_patch16_224"),
        ("ViT-L/16", "vit_large_patch16_224"),
        ("ViT-g/14 of DINOv2", "vit_giant_patch14_dinov2"),
    ):
        row = found[key]
        sizes = [
            f"{row['bytes_layer'] / 1e6:.0f} MB",
            f"{row['bytes_block'] / 1e6:.0f} MB",
            f"{row['bytes'] / 1e9:.2f} GB",
        ]
        assert table[f"{name}, {row['blocks']} blocks"] == sizes
        gflop, image, thousand, whole = table[name]
        assert gflop == f"{row['gflop']:.0f}"
        each = seconds * row["gflop"] / found["vit_base_patch16_224"]["gflop"]
        assert float(image.split(",")[0]) == pytest.approx(each, abs=0.05)
        minutes = float(thousand.split()[0]) * {"min": 1, "h": 60}[thousand.split()[1]]
        assert minutes == pytest.approx(1000 * each / 60, rel=0.03)
        assert whole == f"{each * 1281167 / 86400:.0f} days"


def test_planning_of_large_models():
    table, found = rows(MEASURED), results("bench/results/planning.json")
    for name, key in (
        ("ViT-B/16, 12 blocks", "vit_base_patch16_224"),
        ("ViT-L/16, 24 blocks", "vit_large_patch16_224"),
        ("ViT-g/14 of DINOv2, 40 blocks", "vit_giant_patch14_dinov2"),
    ):
        whole, part = found[key]["extrapolated"], found[key]["measured"]
        expected = [f"{part['2']['cpu']:.1f}", f"{part['6']['cpu']:.1f}", f"{whole['cpu']:.0f}"]
        assert [*table[name][:3], table[name][4]] == [*expected, f"{whole['bytes'] / 1e9:.1f}"], name


def test_whole_models():
    table, said, found = rows(MEASURED), rows(README), results("bench/results/end_to_end.json")
    for case in ("float32, batch 8", "float32, batch 1", "bfloat16, batch 8"):
        pairs = ("dense / plain", "dense / fused", "plain / fused")
        ratios = [f"{found[f'{case}: {pair}']['ratio']:.2f}" for pair in pairs]
        assert [table[case][column] for column in (3, 4, 6)] == ratios, case
    for kind, name in (("fused", "ViT-B at params:40%, uniform ranks"), ("plain", "the same on plain torch linears")):
        ratios = [f"{found[f'{d}, batch 8: dense / {kind}']['ratio']:.2f}" for d in ("float32", "bfloat16")]
        cells = next(cells for first, cells in said.items() if first.startswith(name))
        assert cells[0] == f"{' / '.join(ratios)} times faster"


def test_refinement():
    text = MEASURED.read_text().replace("*", "")
    for row in results("bench/results/refine.json")["rows"]:
        for found in (row["before"], row["after"]):
            assert f"{found['top1']:.2f} ({found['top1_low']:.1f} to {found['top1_high']:.1f})" in text, row["budget"]


def test_bits():
    found = results("docs/results/bits.json")["rows"]
    for document, figures in (
        (README, lambda row: f"{row['bytes'] / 1e6:.2f} MB | {row['top1']:.1f} |"),
        (MEASURED, lambda row: f"{row['bytes'] / 1e6:.3f} | {row['top1']:.2f} ({row['top1_low']:.1f} to "),
    ):
        assert all(figures(row) in document.read_text() for row in found)


def test_frontier():
    sys.path.insert(0, str(ROOT))
    page = pytest.importorskip("bench.compare.frontier.page", reason="bench/ is not beside the documents")
    folder, body = ROOT / "docs" / "results", results("docs/results/frontier.json")
    assert (folder / "frontier.md").read_text() == page.markdown(body)
    svg, said = (folder / "frontier.svg").read_text(), README.read_text()
    assert len(svg) < 100_000 and all(f">{of['title']}</text>" in svg for of in body.values())
    first = said.split("\n## ")[0]
    assert "](docs/results/frontier.svg)" in first
    for model, limit, form, ours in (
        ("vit_tiny", 3.1e6, ".1f", ("vitlr mixed, 2.8 MB", "vitlr mixed, 2.3 MB", "vitlr mixed, 1.8 MB")),
        ("dinov2", 9.6e6, ".3f", ("vitlr bits, 9.4 MB",)),
    ):
        rows, key = body[model]["rows"], body[model]["key"]
        others = [row for row in rows if "vitlr" not in row["name"] and row["bytes"] < limit]
        for name in (*ours, max(others, key=lambda row: row[key])["name"]):
            row = next(row for row in rows if row["name"] == name)
            assert f" {format(row[key], form)} in {row['bytes'] / 1e6:.2f} MB" in first, name


def test_residuals():
    page = (ROOT / "docs" / "kernels" / "lowrank_residual_linear.md").read_text()
    for row in results("docs/results/residuals.json")["rows"]:
        rank = "" if row["form"] == "bf16" else f"{row['r']} "
        error, size = row["error %"], row["of bf16's bytes"]
        figures = f"{error:.3f} | {size:.3f} | {row['KL']:.5f} | {row['agreement %']:.0f} |"
        assert f"| {row['form']} | {rank}| {figures}" in page


def test_candidates():
    """The table of kernels names every candidate of every op, and no other."""
    from vitlr.ops.dispatch import registry

    page = (ROOT / "docs" / "kernels" / "README.md").read_text().split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")][1:]
    said = {op.strip(" `"): set(re.findall(r"`([\w.]+)`", names)) for _, op, _, names in lines}
    assert said == {op: {c.name for c in registry.candidates(op)} - {"torch"} for op in registry._ops}


def test_the_page_of_engines_is_made_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    engines = pytest.importorskip("bench.compare.engines", reason="bench/ is not beside the documents")
    folder = ROOT / "docs" / "results"
    body = json.loads((folder / "engines.json").read_text())
    assert (folder / "engines.md").read_text() == engines.markdown(body)


def test_the_page_of_accuracy_against_milliseconds_is_made_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    page = pytest.importorskip("bench.compare.frontier_time.page", reason="bench/ is not beside the documents")
    folder = ROOT / "docs" / "results"
    if not (folder / "frontier_time.json").is_file():
        pytest.skip("python -m bench.compare.frontier_time has not been run yet")
    body = json.loads((folder / "frontier_time.json").read_text())
    assert (folder / "frontier_time.md").read_text() == page.markdown(body)
    svg = (folder / "frontier_time.svg").read_text()
    assert all(f">{of['title']}, batch 8</text>" in svg for of in body.values() if of["key"])


def test_budgets_of_milliseconds_are_the_table_that_their_run_left():
    kept = json.loads((ROOT / "docs" / "results" / "latency.json").read_text())["rows"]
    page = MEASURED.read_text()
    for row in kept:
        told = row["latency"]
        share = told["measured_ms"] / told["measured_dense_ms"]
        promised = told["promised_ms"] / told["dense_ms"]
        assert share / promised - 1 == pytest.approx(row["off"], abs=1e-6)
        cells = f"| {row['budget']} | {promised:.1%} | {share:.1%} ({told['measured_ms']:.1f} ms) | {row['off']:+.1%} |"
        assert cells in page and f"| {row['top1']:.2f} | {row['kl']:.4f} | {row['predicted_error']:.4f} |" in page


def test_predictions():
    """The ratios of measured to predicted loss, by kind."""
    text = MEASURED.read_text().partition("How far predictions fall short, by kind")[2].partition("Alone,")[0]
    for row in results("docs/results/predictions.json")["rows"]:
        asked = row["asked"].removeprefix("bytes:").removeprefix("params:").replace("MB", " MB").replace("%", " ?%")
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['kind']} |"))
        assert re.search(rf"\b{asked} {row['kl'] / row['predicted']:.1f}\b", line), (row["kind"], row["asked"])
