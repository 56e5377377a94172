"""The Markdown of accuracy against milliseconds: a table a model."""

from __future__ import annotations

from typing import Any

from bench.compare.frontier.page import shown

BASE, INT8 = "torch, float32", "NNCF int8 in OpenVINO, the rest bfloat16"


def markdown(body: dict[str, Any]) -> str:
    """All rows, as they stand in the docs."""
    lines = [
        "# Accuracy against milliseconds",
        "",
        "What a user could run instead, and what vitlr runs, each from the same 300 calibration images without labels "
        "and without training. Every time is the least of some rounds in which all rows of a model take turns in one "
        "process. Rows of vitlr hold bfloat16 for what is not in bytes, as NNCF's do; percents of plans are of the "
        "parameters, those of latency of dense int8's time on our kernels. Made by `python -m "
        "bench.compare.frontier_time`.",
    ]
    for of in body.values():
        lines += ["", *_table(of)]
    return "\n".join(lines) + "\n"


def _table(of: dict[str, Any]) -> list[str]:
    facts, rows = of["machine"], of["rows"]
    timed = {name: row for name, row in rows.items() if "times" in row}
    sizes = list(next(iter(timed.values()))["times"])
    heads = [label for label, _ in of["figures"].values()]
    for size in sizes:
        heads += [f"ms, batch {size}", "over torch", "over NNCF int8 in OpenVINO"]
    lines = [
        f"## {of['title']}",
        "",
        f"Judged on {of['judged_on']}. {of['clock'].capitalize()} on {facts['threads']} thread(s); "
        f"{facts['processor']}, torch {facts['torch']}, {facts['date']}.",
        "",
        f"| method | {' | '.join(heads)} |",
        f"|{'---|' * (len(heads) + 1)}",
        *(_line(name, row, timed, of["figures"], sizes) for name, row in timed.items()),
    ]
    refused = {name: row["refused"] for name, row in rows.items() if "refused" in row}
    return lines + [line for name, why in refused.items() for line in ("", f"{name}: {why}.")]


def _line(name: str, row: dict[str, Any], rows: dict[str, Any], figures: dict[str, Any], sizes: list[str]) -> str:
    cells = [f"**{name}**" if name.startswith("vitlr") else name]
    cells += [shown(row["figures"], key, form) for key, (_, form) in figures.items()]
    for size in sizes:
        ms = row["times"][size]["ms"]
        cells.append(f"{ms:.1f}")
        for base in (BASE, INT8):
            cells.append(f"{rows[base]['times'][size]['ms'] / ms:.2f}" if base in rows else "")
    return f"| {' | '.join(cells)} |"
