"""The Markdown of the frontier: a table a model, every rival beside what vitlr keeps in no more bytes."""

from __future__ import annotations

from typing import Any

OURS = "vitlr"


def markdown(body: dict[str, Any]) -> str:
    """All rows, as they stand in the docs."""
    lines = [
        "# Accuracy against bytes of the file",
        "",
        "What a user could do instead, and what vitlr does, without labels. Bytes are those of the file that is kept: "
        "OpenVINO's .bin, else safetensors. Intervals are 95 % (Wilson; of cosines, normal); all rows of a model see "
        "the same images, so differences between rows are known better than the intervals suggest. KL(dense, small) "
        "in nats, agreement: same first class. Rivals have the settings that their documents advise "
        "(`bench/compare/frontier/rivals.py`): weights in groups of 64, 300 of the calibration images for NNCF, a "
        "classifier's head in 8 bits, what they leave alone in float16. Plain rounding to the nearest stores all else "
        "as vitlr does.",
    ]
    for of in body.values():
        lines += ["", *_table(of)]
    return "\n".join(lines) + "\n"


def _table(of: dict[str, Any]) -> list[str]:
    rows = sorted(of["rows"], key=lambda row: -row["bytes"])
    last = max(rows, key=lambda row: row["machine"]["date"])
    versions = {tool: version for row in rows for tool, version in row["tools"].items()}
    said, facts = ", ".join(f"{tool} {version}" for tool, version in versions.items()), last["machine"]
    key, columns = of["key"], of["figures"]
    heads = [f"{label} (95 %)" if f"{name}_low" in rows[0] else label for name, (label, _) in columns.items()]
    return [
        f"## {of['title']}",
        "",
        f"{of['calibration_images']} calibration images; judged on {of['judged_on']}. {said}, torch {facts['torch']}; "
        f"{facts['processor']}, {facts['date']}. Made by `python -m bench.compare.frontier`.",
        "",
        f"| method | MB | {' | '.join(heads)} | {columns[key][0]} of vitlr in no more bytes |",
        f"|---|---|{'---|' * len(heads)}---|",
        *(_line(row, of) for row in rows),
    ]


def _line(row: dict[str, Any], of: dict[str, Any]) -> str:
    name = f"**{row['name']}**" if row["name"].startswith(OURS) else row["name"]
    cells = [name, f"{row['bytes'] / 1e6:.3f}", *(shown(row, key, form) for key, (_, form) in of["figures"].items())]
    key, form = of["key"], of["figures"][of["key"]][1]
    best = None if row["name"].startswith(OURS) else match(row, of["rows"], key)
    return f"| {' | '.join([*cells, '' if best is None else format(best[key], form)])} |"


def shown(row: dict[str, Any], key: str, form: str) -> str:
    """A figure with its interval, where it has one."""
    text = format(row[key], form)
    if f"{key}_low" not in row:
        return text
    digits = f".{max(int(form[1]) - 1, 0)}f" if row[key] > 1 else form
    return f"{text} ({row[f'{key}_low']:{digits}} to {row[f'{key}_high']:{digits}})"


def match(row: dict[str, Any], rows: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """The best of ours that is no larger than a row of others."""
    able = [r for r in rows if r["name"].startswith(OURS) and r["bytes"] <= row["bytes"]]
    return max(able, key=lambda r: r[key], default=None)
