"""`vitlr report`: the page from the shell, and what is refused first."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_the_page_is_written_with_its_figures(run, squeeze, tmp_path, weights, tiny_vit):
    import vitlr

    run(*squeeze(stats=tmp_path / "stats.safetensors"))
    dense = tmp_path / "dense.safetensors"
    vitlr.save(vitlr.load(tmp_path / "small.safetensors", model=None), tmp_path / "copy.safetensors")
    model = tiny_vit()
    vitlr.save(model, dense)
    given = ["--data", tmp_path / "folder", "--reference", dense, "--stats", tmp_path / "stats.safetensors"]
    files = [tmp_path / "small.safetensors", tmp_path / "copy.safetensors"]
    values = run(
        "report", *files, *given, "-o", tmp_path / "page", "--pictures", "2", "--engines", "torch", "--json"
    ).json
    assert values["bytes"] == (tmp_path / "page" / "report.html").stat().st_size < 3e6
    assert len(values["figures"]) == 7
    text = run("report", files[0], "-o", tmp_path / "page", "--engines", "vitlr").out
    assert text.startswith(f"wrote {tmp_path}/page/report.html: ")


def test_what_can_be_refused_first_is(refused, tmp_path, unread):
    small = tmp_path / "small.safetensors"
    assert "small.safetensors: no such file" in refused("report", small)
    small.write_text("")
    assert "--out is missing" in refused("report", small)
    assert "goes with --reference" in refused("report", small, "-o", tmp_path / "p", "--stats", small)
    checkpoint = ["--reference-checkpoint", small]
    assert "goes with --reference" in refused("report", small, "-o", tmp_path / "p", *checkpoint)
    missing = tmp_path / "missing.safetensors"
    assert "missing.safetensors: no such file" in refused("report", small, "-o", tmp_path / "p", "--reference", missing)
    assert "cannot read --class-names" in refused("report", small, "-o", tmp_path / "p", "--class-names", missing)
    assert "'magic' is unknown" in refused("report", small, "-o", tmp_path / "p", "--engines", "torch,magic")
    assert "is a file, expected a folder" in refused("report", small, "-o", small)
