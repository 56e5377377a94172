"""The Markdown of `prune_cifar`: error relative to the equally long trained dense model, over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "vtp": "VTP alone (2104.08500)",
    "low_rank": "low rank alone",
    "hybrid": "hybrid as published (2203.13444)",
    "joint": "joint: ranks and widths in one knapsack",
    "narrow": "a narrower ViT, trained from nothing",
}
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def markdown(body: Mapping[str, Any]) -> str:
    """All rows of a run, as they will stand in the docs."""
    rows, machine = body["rows"], body["machine"]
    dense = {row["seed"]: row for row in rows if row["arm"] == "dense"}
    if not dense:
        return "no dense model has been trained yet"
    first = next(iter(dense.values()))
    recipe, more = body["recipe"], body["afterwards"]
    each = [f"{row['after']['top1']:.2f}" for row in dense.values()]
    lines = [
        "# Pruning, low rank and both, on CIFAR-10",
        "",
        f"A ViT of 6 blocks, width 128, 4 heads, patches of 8 x 8 ({first['params']:,} parameters, "
        f"{first['macs'] / 1e6:.1f} M MACs an image), trained for {recipe['epochs']} epochs (AdamW, {recipe['lr']:g}, "
        f"cosine, flips and shifts of 4 pixels, label smoothing {recipe['smoothing']:g}). Then {more['epochs']} epochs "
        f"more at {more['lr']:g} for everybody: the dense model, low rank and joint train on for {more['epochs']}; VTP "
        f"and the hybrid train gates (λ = {body['l1']:g}) for one and fine-tune for one. No distillation. Low rank and "
        f"joint are planned from {body['calibration_images']} training images. "
        f"{'bfloat16 autocast' if body['amp'] else 'float32'}, {machine['processor']}, torch {machine['torch']}, "
        f"{machine['date']}.",
        "",
        "The images are the 60,000 of CIFAR-10 as JPEG; accuracy is on all 10,000 test images, which decided nothing. "
        "*Relative error*: the error over that of the dense model of the same seed after as many epochs, minus 1; mean "
        "over seeds and 95 % interval (Student's t), or that mean alone for one seed. *Before tuning* is without any "
        "training for low rank and joint, and after the gates' epoch for VTP and the hybrid.",
        "",
        f"Dense, {recipe['epochs'] + more['epochs']} epochs: top-1 {_mean(dense.values(), 'after'):.2f} % "
        f"({', '.join(each)}); after {recipe['epochs']} epochs "
        f"{_mean(dense.values(), 'before'):.2f} %.",
        "",
        "| fewer | method | parameters kept | MACs kept | top-1 before tuning | top-1 after | relative error | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str], list[Any]] = {}
    for row in rows:
        if row["arm"] != "dense" and row["seed"] in dense:
            fewer = row["fewer"] if row["fewer"] is not None else 100 * (1 - row["params"] / first["params"])
            groups.setdefault((round(fewer), row["arm"]), []).append(row)
    order = list(LABELS)
    for (fewer, arm), found in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        lines.append(_line(fewer, arm, found, dense))
    lines += ["", *_speed(body["speed"])] if body.get("speed") else []
    lines += [line for note in body["notes"] for line in ("", note)]
    return "\n".join(
        [*lines, "", "Made by `python -m bench.trained.prune_cifar`; figures in `bench/results/prune_cifar.json`.", ""]
    )


def relative_errors(rows: Sequence[Mapping[str, Any]], dense: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """The error of every row over that of the dense model of its seed, minus 1, in percent."""
    return [100 * (row["after"]["error"] / dense[row["seed"]]["after"]["error"] - 1) for row in rows]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for one value."""
    if len(values) < 2:
        return None
    mean, n = statistics.fmean(values), len(values)
    half = _T95[n - 1] * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def _line(fewer: float, arm: str, rows: Sequence[Mapping[str, Any]], dense: Mapping[int, Mapping[str, Any]]) -> str:
    first = next(iter(dense.values()))
    relative = relative_errors(rows, dense)
    around = interval(relative)
    shown = f"{statistics.fmean(relative):+.1f} %" + (f" ({around[0]:+.1f} to {around[1]:+.1f})" if around else "")
    kept = [statistics.fmean(row[key] / first[key] for row in rows) for key in ("params", "macs")]
    before = "" if arm == "narrow" else f"{_mean(rows, 'before'):.2f}"
    cells = [f"{fewer:g} %", LABELS[arm], f"{100 * kept[0]:.1f} %", f"{100 * kept[1]:.1f} %", before]
    return "| " + " | ".join([*cells, f"{_mean(rows, 'after'):.2f}", shown, str(len(rows))]) + " |"


def _mean(rows: Any, when: str) -> float:
    return statistics.fmean(row[when]["top1"] for row in rows)


def _speed(found: Mapping[str, Any]) -> list[str]:
    """Ratios to the dense model, timed in turns."""
    lines = [
        f"Images a second on {found['machine']['threads']} thread, batches of {found['batch_size']}, float32, models "
        f"of seed 0 with {found['fewer']:g} % fewer parameters in turns in one process, over the dense model's:",
        "",
        "| method | as it is | fused |",
        "|---|---|---|",
    ]
    for arm, ratios in found["ratios"].items():
        cells = [f"{ratios[form]:.2f}x" if form in ratios else "" for form in ("plain", "fused")]
        lines.append(f"| {LABELS[arm]} | {cells[0]} | {cells[1]} |")
    return lines
