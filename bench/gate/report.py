"""What was found, from the lines alone: Markdown, and the table of times that dispatch reads. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import write_json
from bench.gate import choice, lines, models, pipeline, solve
from bench.gate.lines import Line
from vitlr.ops.dispatch import measured, registry
from vitlr.ops.dispatch.ceilings import peaks

CPU = torch.device("cpu")


def write(path: Path, out: Path | None = None) -> list[Path]:
    """The report and the table of a file of lines: beside it and in vitlr/ops/measured, or both under `out`."""
    found = lines.read(path)
    folder = out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "report.md"
    text.write_text(markdown(found))
    machine = _machine(found)
    device = machine.get("gpu") or "rehearsal"
    place = measured.FOLDER if out is None and machine.get("gpu") else folder
    rows = [{name: row[name] for name in ("op", "key", "us")} for row in lines.times(found)]
    table = place / f"{measured.file_name(device)}.json"
    write_json(table, {"device": device, "date": machine.get("date"), "torch": machine.get("torch"), "rows": rows})
    return [text, table]


def red(found: Sequence[Line]) -> list[str]:
    """What has to be mended, in one line each."""
    every: dict[tuple[str, ...], list[Line]] = {}
    for f in lines.faults(found):
        every.setdefault((f["op"], f["candidate"], f["dtype"], f["fault"]), []).append(f)
    told = [
        f"{op} {candidate} {dtype}: {fault}, {len(these)}x; first: {these[0]['id']}: {these[0]['detail'][:300]}"
        for (op, candidate, dtype, fault), these in every.items()
    ]
    for line in lines.results(found).values():
        if line.get("fault") and not line["candidate"]:
            told.append(f"{line['id']}: {line['fault']}, {line['detail']}")
        if line["kind"] == "whole" and line.get("value") and not line["value"]["off"] <= pipeline.OFF:
            told.append(f"{line['id']}: {line['value']['sum']} is {line['value']['off']:.2g} off the CPU's")
        if line["kind"] == "solve" and line.get("value"):
            told += solve.failures(line["value"])
        if line["kind"] == "model" and line.get("value"):
            told += [
                f"{line['id']}: {row['model']} is {row['off']:.2g} off plain products"
                for row in line["value"]
                if row["off"] is not None and not row["off"] <= models.OFF[row["model"]]
            ]
        if line["kind"] == "build" and line.get("value") and "debug" not in line["call"]:
            told += [f"{kernel} spills" for kernel in line["value"]["spilled"]]
        if line["kind"] == "choice" and line.get("value"):
            told += [
                f"{row['op']} {row['call']}: {row['chosen']} is {row['ratio']:.2f}x the best candidate"
                for row in line["value"]
                if row["ratio"] > choice.WANTED
            ]
    return list(dict.fromkeys(told))


def markdown(found: Sequence[Line]) -> str:
    """All tables."""
    limits, machine = ceilings(found), _machine(found)
    head = f"# The gate on {machine.get('gpu') or 'a CPU, rehearsed'}, {machine.get('date', 'no date')}"
    facts = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "processor") if machine.get(name)
    )
    parts = [head, facts]
    if limits is not None:
        peak = limits.flops_per_s[torch.bfloat16]
        parts.append(
            f"Measured ceilings: copy {limits.bytes_per_s / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s."
        )
    parts += [_section("What failed", _list(red(found))), _section("What is right", _checks(found))]
    parts += [_section("Times", _times(found, limits)), _section("Plans of the CUDA kernel", _sweeps(found))]
    parts += [_section("Whole models", _models(found)), _section("Batched solve", _solves(found))]
    parts.append(_section("Calibration and plan on the card, beside other checks", _whole(found)))
    rows = lines.times(found)
    if len(rows) > 1:
        ratio, where = choice.by_neighbours(rows)
        parts.append(f"Shapes that were not measured: at worst {ratio:.2f}x the best candidate {where}".rstrip())
    parts.append(_section("What was not run", _list(_left(found))))
    return "\n\n".join(filter(None, parts)) + "\n"


def ceilings(found: Sequence[Line]) -> registry.Ceilings | None:
    """What the card reached in the window's first seconds."""
    value = lines.value(found, "ceilings")
    if value is None:
        return None
    return registry.Ceilings("measured", value["bytes_per_s"], peaks(value["flops_per_s"]))


def _machine(found: Sequence[Line]) -> dict[str, Any]:
    value = lines.value(found, "ceilings")
    return value["machine"] if value else {}


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _list(told: Sequence[str]) -> str:
    return "\n".join(f"- {one}" for one in told)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


def _checks(found: Sequence[Line]) -> str:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for line in lines.results(found).values():
        if line["kind"] in ("check", "capture", "part", "debug"):
            what = "skipped" if line.get("skipped") else line.get("fault") or "right"
            rows.setdefault((line["op"], line["candidate"], line["dtype"]), []).append(what)
    cells = []
    for who, every in sorted(rows.items()):
        bad = ", ".join(sorted({what for what in every if what not in ("right", "skipped")}))
        cells.append((*who, every.count("right"), every.count("skipped"), bad))
    return _table(("op", "candidate", "dtype", "right", "not for it", "faults"), cells)


def _times(found: Sequence[Line], limits: registry.Ceilings | None) -> str:
    last = {}
    for line in lines.results(found).values():
        if line["kind"] == "row" and line.get("value"):
            last[line["value"]["op"], line["value"]["call"]] = line["value"]
    cells = []
    for value in last.values():
        us, dense = value["us"], value["us"].get("dense")
        times = [
            f"{name} {time:.1f}" + (f" ({dense / time:.2f}x)" if dense and not name.startswith("dense") else "")
            for name, time in sorted(us.items(), key=lambda item: item[1])
        ]
        key = choice.key_of(value, CPU)
        floor = registry._ops[value["op"]].roofline(key, limits).floor_us if limits else None
        cells.append((value["op"], value["call"], "" if floor is None else f"{floor:.1f}", ", ".join(times)))
    return _table(("op", "call", "floor µs", "µs (times as fast as dense)"), cells)


def _sweeps(found: Sequence[Line]) -> str:
    cells = []
    for line in lines.results(found).values():
        if line["kind"] == "sweep" and line.get("value"):
            us = sorted(line["value"]["us"].items(), key=lambda item: item[1])
            cells.append((line["value"]["call"], ", ".join(f"{plan} {time:.1f}" for plan, time in us)))
        if line["kind"] == "autotune" and line.get("value") and line["value"]["rows"]:
            configs = [str(row["config"]) for row in line["value"]["rows"]]
            cells.append((f"{line['value']['call']}, tiles of {line['candidate']}", "; ".join(configs)))
    return _table(("call", "µs by (R, warpgroups, CTAs, clusters, groups)"), cells)


def _models(found: Sequence[Line]) -> str:
    cells: list[tuple[object, ...]] = []
    for line in lines.results(found).values():
        told = line["kind"] == "model" and "compiler's cache" not in line["call"]
        rows = (line.get("value") or ()) if told else ()
        for r in rows:
            dense = next(row["images_per_s"] for row in rows if row["model"] == "dense")  # of the same turns
            peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
            ratio = f"{r['images_per_s'] / dense:.2f}x"
            cells.append((r["plan"], r["batch"], r["mode"], r["model"], f"{r['images_per_s']:.0f}", ratio, peak))
    return _table(("plan", "batch", "mode", "model", "images/s", "of dense", "peak MB"), cells)


def _whole(found: Sequence[Line]) -> str:
    cells = []
    for line in lines.results(found).values():
        if line["kind"] == "whole" and (value := line.get("value")):
            peak = "" if value["peak_mb"] is None else f"{value['peak_mb']:.0f}"
            far = f"{value['off']:.1e} ({value['sum']})"
            cells.append((line["call"], far, f"{value['images_per_s']:.0f}", peak, f"{value['plan_s']:.1f}"))
    return _table(("what", "furthest off the CPU's", "images/s", "peak MB", "plan, s"), cells)


def _solves(found: Sequence[Line]) -> str:
    rows = [row for line in lines.results(found).values() if line["kind"] == "solve" for row in line.get("value") or ()]
    loop = next((row["ms"] for row in rows if row["solver"].startswith("loop")), None)
    cells = [
        (
            row["solver"],
            f"{row['ms']:.2f}",
            f"{loop / row['ms']:.2f}x" if loop else "",
            "" if row["excess"] is None else f"{row['excess']:.1e}",
        )
        for row in rows
    ]
    return _table(("solver", "ms", "of the loop", "excess loss"), cells)


def _left(found: Sequence[Line]) -> list[str]:
    done = lines.results(found)
    why = {line["id"]: line["why"] for line in found if line["what"] == "left" and line["id"] not in done}
    begun = {line["id"] for line in found if line["what"] == "start"} - set(done) - set(why)
    return [f"{task}: {reason}" for task, reason in why.items()] + [
        f"{task}: begun, not ended" for task in sorted(begun)
    ]
