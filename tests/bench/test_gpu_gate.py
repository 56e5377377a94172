"""The GPU gate, as far as it goes without a GPU: what it plans, what it writes, and that nothing makes it lose that."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitlr.ops.dispatch import registry

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("bench/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

lines, plan, report, tuning = (
    importlib.import_module(f"bench.gate.{name}") for name in ("lines", "plan", "report", "tuning")
)

WINDOWS = {1: plan.window_one(torch.device("cuda")), 2: plan.window_two(torch.device("cuda"))}


def gate(*flags: str, seconds: float = 1800) -> subprocess.CompletedProcess:
    """Run from elsewhere by its path, as on a machine that has only a copy of the tree."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VITLR_BACKEND")}
    command = [sys.executable, str(ROOT / "bench" / "gpu_gate.py"), *flags]
    return subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=seconds, cwd="/")


def every_task(number: int) -> list:
    return [task for phase in WINDOWS[number].phases for group in phase.groups(()) for task in group.tasks]


@pytest.mark.slow
def test_every_kernel_compiles_within_its_bounds_and_is_right_in_the_interpreter(tmp_path):
    done = gate("--compile-only", "--json", str(tmp_path / "gate.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    written = json.loads((tmp_path / "gate.json").read_text())
    assert not written["failures"] and "green" in done.stdout
    modules = {row["module"] for row in written["compiled"]}
    assert {"byte_linear", "byte_rows"} | {
        f"lowrank_{name}" for name in ("linear", "mlp", "residual_linear")
    } <= modules
    assert "weighted_gram_chain" in modules
    assert {row["target"] for row in written["compiled"]} == {"sm_80", "sm_90"}
    assert all(row["bound"] for row in written["compiled"]), "a case without a bound"


@pytest.mark.slow
def test_no_fault_and_no_kill_loses_anything_but_itself(tmp_path):
    """Hangs, crashes, NaN, wrong values, lost contexts, a killed supervisor: rehearsal.py says what has to hold."""
    done = gate("--rehearse", "--out", str(tmp_path), seconds=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = lines.read(tmp_path / "two" / "window2.jsonl")
    kinds = {line["kind"] for line in lines.results(found).values()}
    assert {"ceilings", "check", "row", "compile", "model", "solve", "choice"} <= kinds
    whole = next(line["value"] for line in lines.results(found).values() if line["kind"] == "whole")
    assert whole["off"] < 1e-5 and whole["ranks"] and "calibration and plan" in (tmp_path / "report.md").read_text()
    timed = next(line["value"]["us"] for line in lines.results(found).values() if "torch.compile" in line["id"])
    assert {"dense", "dense epilogue", "dense compiled", "torch", "torch epilogue", "torch compiled"} <= timed.keys()
    assert "triton.row_block" in timed
    plans = {row["plan"] for line in lines.results(found).values() if line["kind"] == "model" for row in line["value"]}
    assert plans == {"ranks 8", "params:60%", "joint params:60%"}
    text = (tmp_path / "report.md").read_text()
    assert "fault.hangs_later float32: hung" in text and "two deaths stopped this candidate" in text


@pytest.mark.parametrize(("number", "limit"), [(1, 280), (2, 270)])
def test_a_window_is_planned_to_fit(number, limit):
    window = WINDOWS[number]
    assert window.seconds <= limit
    for phase in window.phases:
        assert phase.planned() <= phase.seconds, f"{phase.name} is cut off by plan"
    told = gate("--plan").stdout
    assert f" {window.seconds:.0f} |" in told and "| together |" in told


@pytest.mark.parametrize("number", [1, 2])
def test_every_task_is_done_once(number):
    ids = [task.id for task in every_task(number)]
    assert len(ids) == len(set(ids)), sorted({one for one in ids if ids.count(one) > 1})


def test_every_gpu_candidate_is_checked():
    checked = {(task.op, task.candidate) for task in every_task(1) if task.kind in ("check", "part")}
    names = {
        (op, candidate.name)
        for op, entry in registry._ops.items()
        for candidate in entry.candidates
        if candidate.backend in ("triton", "cuda")
    }
    # The batched solve on Triton is its chain between torch's calls, and timed by window 2 with its loss.
    assert names - checked == {("batched_solve", "triton.chain")}
    assert checked <= names


def test_what_window_one_times_is_checked_at_that_very_shape():
    checked = {(task.op, task.candidate, task.call) for task in every_task(1) if task.kind == "check"}
    timed = [task.given["call"] for task in every_task(1) if task.kind == "row"]
    assert len(timed) > 16
    names = {
        "lowrank_mlp": ("triton.row_block", "cuda.sm90"),
        "lowrank_linear": ("triton.row_block", "cuda.cluster"),
        "fp8_chain": ("triton.bytes", "cuda.bytes", "cuda.mlp"),
    }
    for call in timed:
        for name in names[call.op]:
            assert (call.op, name, call.label) in checked, f"{name} is not checked at {call.label}"


def test_the_mlp_is_checked_with_several_items_a_cta_and_every_rank_that_plans_need():
    labels = {task.call for task in every_task(1) if (task.kind, task.candidate) == ("check", "cuda.sm90")}
    for r in (64, 128, 192, 256):
        assert f"768-3072-768 r={r},{r} M=50437 gelu bfloat16" in labels
    assert "768-3072-768 r=128,128 M=20005 gelu bfloat16" in labels
    for r in (64, 128, 224, 256):
        assert f"768-3072-768 r={r},{r} M=12608 gelu bfloat16" in labels


def test_a_cuda_graph_is_the_first_thing_a_cuda_kernel_has_to_survive():
    groups = {group.name: group for phase in WINDOWS[1].phases for group in phase.groups(())}
    for name in ("cuda chain", "cuda bytes", "cuda mlp", "cuda cluster", "cuda sm90"):
        assert groups[name].tasks[0].kind == "capture" and groups[name].after == plan.BUILD


def test_window_two_times_every_mlp_against_torch_compile_and_cublas():
    rows = [task for task in every_task(2) if task.kind == "row" and task.op == "lowrank_mlp"]
    assert len(rows) >= 12
    assert all(set(plan.EPILOGUES) <= set(task.given["rivals"]) for task in rows)
    assert sum(set(plan.COMPILED_RIVALS) <= set(task.given["rivals"]) for task in rows) >= 12


def test_window_two_runs_the_plans_that_people_take_in_bf16_and_in_bytes():
    models = [task for task in every_task(2) if task.kind == "model" and "cache" not in task.call]
    cells = {(task.given["plan"], task.given["batch"]) for task in models}
    ours = {(name, batch) for name in ("ranks 128", "params:40%", "joint params:60%") for batch in (1, 64, 256)}
    assert cells == ours | {(f"joint params:{share}%", batch) for share in (80, 40) for batch in (64, 256)}
    graphs = [task for task in models if task.given.get("mode", "graph") == "graph"]
    assert all("names" not in task.given for task in graphs)  # all of them: dense, products, fused, fp8, dense fp8


def test_what_window_two_times_in_bytes_is_checked_before_and_has_its_rivals():
    rows = [task for task in every_task(2) if task.kind == "row" and task.op in ("fp8_chain", "int8_chain")]
    labels = " ".join(task.call for task in rows)
    assert all(form in labels for form in ("768-224-3072-224-768", "768-384-3072-384-768", "768-3072-768", "768-1920"))
    assert all({"dense", "dense epilogue", plan.FP8_RIVAL} <= set(task.given["rivals"]) for task in rows)
    assert all("four epilogue" in task.given["rivals"] for task in rows if "224" in task.call or "384" in task.call)
    checked = {(task.op, task.call) for number in (1, 2) for task in every_task(number) if task.kind == "check"}
    assert {(task.op, task.given["call"].label) for task in rows} <= checked


def test_only_what_went_wrong_on_the_cuda_kernels_is_bisected():
    every = [task for task in every_task(1) if task.candidate == "cuda.sm90"]
    bad = every[3]
    fault = {"what": "fault", "id": bad.id, "op": bad.op, "candidate": bad.candidate, "dtype": bad.dtype}
    assert plan.bisection([], every) == []
    build, again = plan.bisection([{**fault, "fault": "hung", "detail": ""}], every)
    assert build.tasks[0].given == {"debug": True} and again.after == build.tasks[0].id
    assert [task.call for task in again.tasks] == [bad.call]


@pytest.mark.parametrize("r", [64, 128, 192, 256])
def test_swept_plans_hold_the_rank_and_stay_on_the_card(r):
    for R, warpgroups, ranks, clusters, groups in tuning.plans(12608, r):
        assert r == R and warpgroups in (1, 2, 3) and ranks * clusters <= 132 and groups == 1


def test_a_line_that_a_kill_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "window1.jsonl"
    book = lines.Book(path)
    book.write("start", id="one")
    with path.open("a") as file:
        file.write('{"what": "result", "id": "on')
    assert [line["id"] for line in lines.read(path)] == ["one"]
    lines.Book(path).write("start", id="two")
    assert [line["id"] for line in lines.read(path)] == ["one", "two"]


def test_a_later_run_has_what_an_earlier_one_found(tmp_path):
    first = lines.Book(tmp_path / "a.jsonl")
    first.write("start", id="one")
    second = lines.Book(tmp_path / "out" / "b.jsonl", lines.read(first.path))
    second.write("start", id="two")
    assert [line["id"] for line in lines.read(second.path)] == ["one", "two"]
    assert [line["id"] for line in lines.Book(second.path, lines.read(first.path)).lines] == ["one", "two"], "once"


def _fault(candidate: str, fault: str, dtype: str = "bfloat16") -> dict[str, str]:
    who = {"op": "lowrank_mlp", "candidate": candidate, "dtype": dtype}
    return {"what": "fault", "id": f"check {candidate}", **who, "fault": fault, "detail": "a reason"}


def test_a_fault_excludes_one_candidate_in_one_dtype_and_two_deaths_stop_it():
    found = [_fault("a", "wrong"), _fault("a", "hung", "float16"), _fault("b", "hung"), _fault("b", "crashed")]
    assert lines.excluded(found) == {
        ("lowrank_mlp", "a", "bfloat16"),
        ("lowrank_mlp", "a", "float16"),
        ("lowrank_mlp", "b", "bfloat16"),
    }
    assert lines.stopped(found) == {("lowrank_mlp", "b")}


def test_the_report_and_the_table_come_from_the_lines_alone(tmp_path):
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-30"}
    key = {"M": 12608, "K": 768, "D": 3072, "N": 768, "r1": 128, "r2": 128, "act": "gelu", "residual": False}
    key["dtype"] = "bfloat16"
    us = {"torch": 80.0, "triton.row_block": 60.0, "cuda.sm90": 50.0, "dense": 150.0, "dense epilogue": 130.0}
    who = {"op": "lowrank_mlp", "candidate": "", "dtype": "bfloat16", "call": "an MLP", "seconds": 1.0}
    value = {"op": "lowrank_mlp", "call": "an MLP", "key": key, "us": us, "candidates": list(us)[:3]}
    limits = {"bytes_per_s": 3.0e12, "flops_per_s": 800e12, "machine": facts}
    book = lines.Book(tmp_path / "window1.jsonl")
    book.write("result", id="ceilings", **{**who, "kind": "ceilings"}, value=limits)
    book.write("result", id="row", **{**who, "kind": "row"}, value=value)
    bad = {"kind": "check", "candidate": "cuda.sm90", "fault": "hung", "detail": ""}
    book.write("result", id="check cuda.sm90", **{**who, **bad})
    book.write(**_fault("cuda.sm90", "hung"))
    book.write("start", id="a row that was running")
    done = gate("--report", str(book.path), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "# The gate on NVIDIA H100 80GB HBM3, 2026-11-30" in text and "copy 3.00 TB/s" in text
    assert "lowrank_mlp cuda.sm90 bfloat16: hung, 1x" in text
    assert "triton.row_block 60.0 (2.50x)" in text and "a row that was running: begun, not ended" in text
    floor = 2 * 12608 * 2 * 128 * (768 + 3072) / 800e12 * 1e6
    assert f"| {floor:.1f} |" in text, "by the ceilings that were measured"
    table = json.loads((tmp_path / "out" / "nvidia_h100_80gb_hbm3.json").read_text())
    assert table["device"] == facts["gpu"] and table["torch"] == "2.11.0"
    assert table["rows"] == [{"op": "lowrank_mlp", "key": key, "us": {"torch": 80.0, "triton.row_block": 60.0}}]


def test_a_report_of_nothing_says_so(tmp_path):
    path = tmp_path / "window1.jsonl"
    path.write_text("")
    assert "no date" in report.markdown(lines.read(path))
    done = gate("--report", str(tmp_path / "other.jsonl"))
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr


def test_a_window_says_where_it_wants_to_write():
    done = gate("--window", "1")
    assert done.returncode == 2 and "--window needs --out DIR" in done.stderr
