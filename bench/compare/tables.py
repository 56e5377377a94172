"""The Markdown of `compare_methods`: a table a budget, ours and the best published one set apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS = {
    "svd": "plain SVD",
    "asvd": "ASVD (diagonal, alpha 0.5)",
    "fwsvd": "FWSVD",
    "svd_llm": "SVD-LLM (whitening)",
    "afm": "AFM (output PCA)",
    "vitlr-loss": "**vitlr, loss**",
    "vitlr-fisher": "vitlr, fisher",
    "vitlr-output": "vitlr, output",
    "vitlr-normalized": "vitlr, normalized (objective of 2402.06004)",
}


def markdown(body: Mapping[str, Any]) -> str:
    """All rows of a run, as they will stand in the docs."""
    dense, machine = body["dense"], body["machine"]
    subset = f"the {body['validation_images']}-image subset of the ILSVRC2012 validation set"
    lines = [
        "# Methods compared, without any training",
        "",
        f"`{body['model']}` ({body['weights']}), {body['calibration_images']} calibration images "
        f"({body['samples']} drawn targets each for the gradient moments), accuracy on {subset} "
        "(easier than the full set: do not read it as ImageNet accuracy). "
        f"Dense: top-1 {_interval(dense)}, {dense['params']:,} parameters. Intervals are 95 % (Wilson); all rows see "
        "the same images, so differences between rows are known better than the intervals suggest.",
        "",
        "Factors are those of the papers (`vitlr/baselines.py`). Ranks *uniform*: each layer keeps the same share of "
        "its weights; *allocated*: our knapsack on the method's own energies; both at rank step 1. *allocated-16*: at "
        "step 16, the default of `plan`. Agreement: same first class as the dense model. KL(dense, small) in nats. "
        f"Seconds: decomposition + plan and apply, on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, {machine['date']}; the one calibration pass that collects what all of them need took "
        f"{body['calibration_seconds']:.0f} s. Code {body['code']}.",
        "",
        "Made by `python -m bench.compare.methods`; figures and ranks in `compare_methods.json`.",
    ]
    for budget in dict.fromkeys(r["budget"] for r in body["rows"]):
        rows = [r for r in body["rows"] if r["budget"] == budget]
        lines += ["", f"## {budget}", ""]
        lines += [
            "| method | ranks | top-1 (95 %) | top-5 | agreement | KL | parameters | kept | MACs kept | seconds |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(r) for r in rows]
        summary = _summary(rows)
        lines += ["", summary] if summary else []
    return "\n".join(lines) + "\n"


def _interval(r: Mapping[str, Any]) -> str:
    return f"{r['top1']:.2f} ({r['top1_low']:.1f} to {r['top1_high']:.1f})"


def _line(r: Mapping[str, Any]) -> str:
    cells = [
        LABELS.get(r["method"], r["method"]),
        r["allocation"],
        _interval(r),
        f"{r['top5']:.2f}",
        f"{r['agreement']:.2f}",
        f"{r['kl']:.3f}",
        f"{r['params']:,}",
        f"{r['params_kept']:.1%}",
        f"{r['macs_kept']:.1%}",
        f"{r['decompose_seconds']:.1f} + {r['seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _summary(rows: list[Mapping[str, Any]]) -> str:
    """How far our default lies above the best published method at uniform ranks."""
    published = [r for r in rows if not r["method"].startswith("vitlr") and r["allocation"] == "uniform"]
    ours = [r for r in rows if r["method"] == "vitlr-loss" and r["allocation"] == "allocated"]
    if not published or not ours:
        return ""
    best = max(published, key=lambda r: r["top1"])
    gap = ours[0]["top1"] - best["top1"]
    return (
        f"Ours (loss, allocated) {ours[0]['top1']:.2f}; best published factors at uniform ranks "
        f"{best['top1']:.2f} ({LABELS[best['method']]}): {gap:+.1f} points."
    )
