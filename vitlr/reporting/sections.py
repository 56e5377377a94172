"""The sections of the page: all files in one table, then each file by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitlr.planning.plans import Plan
from vitlr.planning.tables import KINDS
from vitlr.reporting import page
from vitlr.reporting.disagreement import Disagreement, thumbnail
from vitlr.reporting.figures import share
from vitlr.reporting.layers import by_kind
from vitlr.reporting.rows import Row
from vitlr.reporting.subjects import Subject
from vitlr.runtime.machine import processor

LINES = {
    "kept": "Where the budget went: what is kept of every linear layer, block by block.",
    "losses": "What that is predicted to cost, in the unit of the plan's objective; predictions rank choices.",
    "spectra": "Spectra: the share of a layer's loss left at every rank, deeper ones darker, a dot for the plan.",
}
ENGINES = {
    "torch": "plain torch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "vitlr": "vitlr's kernels, fused",
}
MEANINGS = {
    "rank": "A layer's matrix is a product of two thin ones; the fewer columns between them, the smaller and coarser.",
    "width": "Hidden neurons of an MLP, or channels of queries and keys, that are left.",
    "bits": "What a stored weight takes on average, where weights are rounded.",
    "MACs": "Multiplications with additions for one image.",
    "predicted error": "What the plan expected from calibration images: with the objectives fisher and loss KL in "
    "nats, else a squared error of outputs. It ranks choices; measured KL is two to five times as large.",
    "KL, agreement": "How far the small model's answers are from dense's (0: equal), and how often both name the same "
    "class first.",
    "attn, mlp": "Bars of what a whole attention or MLP loses by a smaller width.",
}


def all_of(subjects: Sequence[Subject], rows: Sequence[Row], overview: Path | None, texts: dict[str, Any]) -> list[str]:
    """The body of the page."""
    parts = [_table(rows), page.words(_how(rows, texts), soft=True)]
    if overview is not None:
        parts.append(page.figure(overview, "accuracy against megabytes and milliseconds"))
    for subject in subjects:
        parts += _one(subject, texts)
    parts.append(page.folded("What these words mean", page.table(["", ""], [*MEANINGS.items()], long=1)))
    return parts


def _table(rows: Sequence[Row]) -> str:
    of, letter = _macs(max((row.macs or 0 for row in rows), default=0))
    header = ["", "MB", "params, M", f"MACs, {letter}"]
    judged = [key for key in ("top1", "agreement", "kl", "cosine") if any(getattr(r, key) is not None for r in rows)]
    heads = {"top1": "top-1, % (95 %)", "agreement": "agreement, %", "kl": "KL, nats", "cosine": "cosine"}
    header += [*(heads[key] for key in judged), "ms", "speed"]
    lines = []
    for row in rows:
        cells = [row.name, f"{row.bytes / 1e6:.2f}", _number(row.params, 1e6, ".2f"), _number(row.macs, of, ".3f")]
        cells += [_judged(row, key) for key in judged]
        cells += [_number(row.ms, 1, ".1f"), "" if row.speedup is None else f"{row.speedup:.2f}x"]
        lines.append(cells)
    return page.table(header, lines)


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value / unit, form)


def _macs(most: int) -> tuple[float, str]:
    """The unit that multiply-accumulates are told in: billions, of small models millions."""
    return (1e9, "G") if most >= 1e8 else (1e6, "M")


def _judged(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return ""
    if key == "top1":
        return f"{value:.1f} ({row.top1_low:.1f} to {row.top1_high:.1f})"
    return format(value, {"agreement": ".1f", "kl": ".4f", "cosine": ".4f"}[key])


def _how(rows: Sequence[Row], texts: dict[str, Any]) -> str:
    images = max(row.images for row in rows)
    judged = f"Judged on {images} images; the interval is Wilson's, of 95 %. " if images else "No images were given. "
    return (
        f"{judged}MB are those of the file, of dense its weights. ms: one image in float32, the faster of plain "
        f"torch and vitlr's kernels, in turns with dense in plain torch, {texts['threads']} thread(s) of {processor()}."
    )


def _one(subject: Subject, texts: dict[str, Any]) -> Iterator[str]:
    """One file."""
    yield page.heading(subject.name)
    plan = subject.plan
    if plan is None:
        yield page.words("This file holds no plan, so where its budget went is not known.")
    else:
        yield page.words(_summary(subject, plan))
        for kind, path in subject.drawn.items():
            yield page.words(LINES[kind], soft=True)
            yield page.figure(path, LINES[kind])
        yield _blocks(plan)
        yield page.folded("Every layer, and why", _layers(plan))
    yield page.heading("Time", 3)
    yield from _time(subject)
    if subject.spotted:
        yield page.heading("Where it disagrees with dense most", 3)
        yield page.words("By KL(dense, small) in nats; the share that each gives to its first five classes.", soft=True)
        yield page.cards(_card(one, texts) for one in subject.spotted)


def _time(subject: Subject) -> Iterator[str]:
    """Milliseconds by engine and batch, dense and small, and how many times faster small is in the same engine."""
    speeds = subject.speeds
    header = ["ms an image"]
    for batch in speeds.ms:
        header += [f"dense, {batch} at once", "small", "speed"]
    lines = []
    for engine, called in ENGINES.items():
        if any(engine in at for at in speeds.ms.values()):
            line = [called]
            for at in speeds.ms.values():
                dense, small = (at.get(engine, {}).get(which) for which in ("dense", "small"))
                times = "" if dense is None or small is None else f"{dense / small:.2f}x"
                line += [_number(dense, 1, ".2f"), _number(small, 1, ".2f"), times]
            lines.append(line)
    yield page.table(header, lines)
    for where, why in speeds.refused.items():
        yield page.words(f"Not timed: {where}: {why}", soft=True)


def _summary(subject: Subject, plan: Plan) -> str:
    done = [f"{len(plan.levels)} of {len(plan.layers)} layers rounded"] * bool(plan.levels)
    done += [f"{len(plan.ranks)} factorised"] * bool(plan.ranks)
    done += [f"{len(plan.narrowed)} of {len(plan.widths)} widths narrower"] * bool(plan.narrowed)
    images = subject.recipe.get("images")
    seen = f", from {images} images" if isinstance(images, int) else ""
    totals = [
        ("parameters", plan.params, plan.params_kept, 1e6, "M"),
        ("MACs", plan.macs, plan.macs_kept, *_macs(plan.macs)),
    ]
    totals.append(("bytes", plan.bytes, plan.bytes_kept, 1e6, "MB"))
    kept = ", ".join(f"{name} {a / unit:.2f} to {b / unit:.2f} {word}" for name, a, b, unit, word in totals)
    made = f"Budget {plan.budget}, method {plan.method}, objective {plan.objective}{seen}"
    return f"{made}: {', '.join(done) or 'no change'}; {kept}. Predicted error {plan.error:.4g}."


def _blocks(plan: Plan) -> str:
    """What became of every layer, a row a block."""
    kinds = by_kind(plan.layers)
    count = 1 + max((block for rows in kinds.values() for block, _ in rows), default=0)
    cells: list[list[tuple[str, float] | None]] = [[None] * len(kinds) for _ in range(count)]
    for column, rows in enumerate(kinds.values()):
        for block, row in rows:
            what = "x".join(map(str, row.shape)) if row.kept_in or row.kept_out else "dense"
            what = f"rank {row.rank}" if row.rank is not None else what
            bits = "" if row.level is None else f"{row.bits or 0:.1f} bits"
            text = bits if bits and what == "dense" else f"{what} {bits}".strip()
            cells[block][column] = (text, share(plan, row))
    return page.heat(["block", *kinds], [(str(block), row) for block, row in enumerate(cells)])


def _layers(plan: Plan) -> str:
    lines = []
    for row in plan.layers:
        rank, bits = ("" if value is None else f"{value:g}" for value in (row.rank, row.bits))
        shape = "x".join(map(str, row.shape))
        lines.append([row.name, shape, rank, bits, f"{row.params:,}", f"{row.error:.3g}", row.reason])
    for width in plan.widths:
        size, kind = f"{width.width} of {width.full_width}", KINDS.get(width.kind, width.kind)
        lines.append([width.name, size, kind, "", "", f"{width.error:.3g}", width.reason])
    return page.table(["layer", "size", "rank", "bits", "weights", "predicted", "why"], lines, long=6)


def _card(one: Disagreement, texts: dict[str, Any]) -> str:
    names = texts["classes"]

    def said(pairs: Sequence[tuple[int, float]]) -> list[str]:
        return [f"{names[c] if names is not None else f'class {c}'} {share:.0%}" for c, share in pairs]

    picture = thumbnail(one.image, *texts["normal"])
    return page.card(picture, f"KL {one.distance:.2f}", [("dense", said(one.dense)), ("small", said(one.small))])
