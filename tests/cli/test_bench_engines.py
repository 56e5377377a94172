"""`vitlr bench --engines`: one model in several engines, in turns, with its accuracy in each."""

from __future__ import annotations

import pytest
import torch
from commandline import NAME, TINY

from vitlr.engines import names, runners
from vitlr.engines.running import ENGINES, Engine

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def test_every_engine_is_timed_and_judged_beside_the_others(run, squeeze, image_folder, tmp_path):
    run(*squeeze())
    engines = [name for name in ("torch", *ENGINES, "vitlr") if name in names.installed()]
    asked = ("--engines", ",".join(engines), "-b", "1,2", "--repeats", "2", "--data", image_folder(name="val"))
    answer = run("bench", tmp_path / "small.safetensors", *asked, "--json").json
    assert [(row["batch_size"], row["engine"]) for row in answer["results"]] == [
        (n, e) for n in (1, 2) for e in engines
    ]
    for row in answer["results"]:
        base = next(r for r in answer["results"] if r["batch_size"] == row["batch_size"])
        assert row["speedup"] == pytest.approx(base["batch_ms"] / row["batch_ms"]) and row["batch_ms"] > 0
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["batch_ms"])
    tops = {answer["accuracy"][name]["top1"] for name in engines}
    assert len(tops) == 1 and answer["int8"] == dict.fromkeys(engines[1:-1], 0)


def test_the_table_fits_eighty_columns(run, weights, image_folder):
    asked = ("--engines", "vitlr,torch", "-b", "1", "--repeats", "1", "--data", image_folder(name="val"))
    lines = run("bench", NAME, "--checkpoint", weights, *asked, *TINY).out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "over vitlr" in lines[1] and [line.split()[0] for line in lines[2:4]] == ["vitlr", "torch"]
    assert lines[4].split()[:2] == ["engine", "top-1"]


def test_all_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(names, "is_installed", lambda name: name != "onnxruntime")
    assert names.parse_engines("all") == ("torch", "compile", "openvino", "vitlr")


def test_compiled_it_runs_on_plain_torch(tiny_vit, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: seen.append((model, dynamic)) or model)
    made = runners.runners(tiny_vit(), ("torch", "compile"), tmp_path)
    assert list(made) == ["torch", "compile"] and seen == [(made["torch"].model, False)]
    assert not any(isinstance(runner, Engine) for runner in made.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engines", "torch,magic"), "'magic' is unknown, expected some of torch, compile, onnxruntime"),
        (("--engines", "torch", "--vs", NAME), "--vs is none of them"),
        (("--engines", "torch", "--no-kernels"), "--kernels is none of them"),
        (("--engines", "torch", "--limit", "3"), "--limit is for accuracy in --engines, which takes --data"),
        (("--data", "."), "--data is for accuracy in --engines"),
        (("--engines", "torch,onnxruntime", "--precision", "bfloat16"), "ONNX Runtime computes in float32 and int8"),
    ],
)
def test_what_does_not_go_together(refused, flags, said):
    assert said in refused("bench", NAME, "-b", "1", *flags, *TINY)
