"""Budgets of milliseconds on the real ViT-Ti: promised and measured time, and what it cost; Markdown and JSON.

    python -m bench.compare.latency [--budgets latency:60% ...] [--batch-size 8] [--threads 1] [--dtype float32]

Nothing was chosen on the validation images. On a machine that is not idle let the threads be 1: of one thread only the
time counts that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.vit_tiny import CHECKPOINT, MODEL, Recorded, calibration_tar, validation
from vitlr.checkpoint.creation import create_model
from vitlr.compression import compressed
from vitlr.data.loader import open_data
from vitlr.measuring.evaluation import evaluate

BUDGETS = ("latency:75%", "latency:60%", "latency:50%")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder, cache = data_folder(args.data), BUILD / "compare_latency"
    cache.mkdir(parents=True, exist_ok=True)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    images = open_data(calibration_tar(folder), model, batch_size=16, limit=args.images)
    stats = args.stats or cache / f"statistics-{args.images}.safetensors"
    loader = validation(folder, model, cache / f"validation-{args.limit or 'all'}.pt", args.eval_batch, args.limit)
    dense = Recorded(model, loader)
    reference = evaluate(dense, loader)
    print(f"dense: {reference}", file=sys.stderr)
    rows = []
    for budget in args.budgets:
        how: dict[str, Any] = {"batch_size": args.batch_size, "threads": args.threads, "stats": stats}
        done = compressed(model.to(getattr(torch, args.dtype)), images, budget, **how)
        plan, latency = done.plan, done.plan.latency
        assert latency is not None
        dense.next = 0
        row = {"budget": budget, **evaluate(done.model, loader, dense).to_dict(), "predicted_error": plan.error}
        row |= {"int8": len(plan.bytes_layers), "ranks": len(plan.ranks), "widths": plan.narrowed, "off": latency.off}
        rows.append({**row, "bytes": plan.bytes_kept, "latency": latency.to_dict()})
        print("\n".join(str(plan).splitlines()[-6:]), file=sys.stderr)
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    body = {"model": MODEL, "weights": CHECKPOINT, "calibration_images": args.images, "code": CODE}
    body |= {"validation_images": reference.images, "machine": machine(), "dense": reference.to_dict(), "rows": rows}
    write_json(args.out / "latency.json", body)
    (args.out / "latency.md").write_text(markdown(json.loads(json.dumps(body))))


def markdown(body: dict[str, Any]) -> str:
    """All rows, as they stand in the docs."""
    facts, how, dense = body["machine"], body["rows"][0]["latency"], body["dense"]
    lines = [
        "# Budgets of milliseconds: promised and measured",
        "",
        f"`{body['model']}` ({body['weights']}), {how['dtype']}, batches of {how['batch_size']} on {how['threads']} "
        f"thread(s); {body['calibration_images']} calibration images, no training; accuracy on "
        f"{body['validation_images']} validation images (easier than the full set). Dense: top-1 {dense['top1']:.2f} "
        f"({dense['top1_low']:.1f} to {dense['top1_high']:.1f}). Shares are of the dense model's time, "
        "measured in turns.",
        "",
        f"{facts['processor']}, torch {facts['torch']}, {facts['date']}; code {body['code']}. Made by "
        "`python -m bench.compare.latency`; all figures in `latency.json`.",
        "",
        "| budget | promised | measured | off | corrected by | int8, low rank, narrowed | top-1 | KL | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in body["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    told, widths = row["latency"], row["widths"]
    promised, found = told["promised_ms"] / told["dense_ms"], told["measured_ms"] / told["measured_dense_ms"]
    cells = [row["budget"], f"{promised:.1%}", f"{found:.1%} ({told['measured_ms']:.1f} ms)", f"{row['off']:+.1%}"]
    cells += [f"{told['correction']:.3f}", f"{row['int8']}, {row['ranks']}, {len(widths)}", f"{row['top1']:.2f}"]
    cells += [f"{row['kl']:.4f}", f"{row['predicted_error']:.4f}"]
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--budgets", nargs="+", default=list(BUDGETS), metavar="BUDGET")
    args.add_argument("--batch-size", type=int, default=8, help="of the budget")
    args.add_argument("--dtype", default="float32")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--images", type=int, default=1000, help="calibration images")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--eval-batch", type=int, default=50)
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
