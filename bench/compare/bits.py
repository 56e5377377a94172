"""Bits on the real ViT-Ti, without any training: top-1 against bytes of the file, one table, Markdown and JSON.

    python -m bench.compare.bits [--data FOLDER] [--stats FILE] [--out docs/results]
    python -m bench.compare.bits --refined 1.8 [--choice steps=1000 ...]

The second refines the model of that size without labels, going on where it was interrupted, and adds the row to the
figures that are there; what is kept is decided on held-out calibration images.

One calibration serves every row. The rival is plain rounding: every group of 64 weights of a row gets the step and the
zero that lose least of the weight itself, nothing is made up for, and everything else is stored as ours is.
Validation images are for these figures only; nothing was chosen on them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.frontier.rivals import GROUP
from bench.compare.refinement import choice
from bench.compare.vit_tiny import CHECKPOINT, MODEL, Kept, Recorded, calibration_tar, validation
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.files import load, save
from vitlr.data.loader import open_data
from vitlr.measuring.cost import count_bytes, count_rest, rest
from vitlr.measuring.evaluation import evaluate
from vitlr.planning.planner import plan
from vitlr.refinement.ladder import refine
from vitlr.refinement.report import Refinement
from vitlr.reporting.nearest import rounded
from vitlr.runtime import compact
from vitlr.runtime.progress import bar
from vitlr.surgery.application import apply

SIZES = (3.4, 2.8, 2.3, 1.8)  # MB of the whole file
HEADER = 42e3  # bytes: names and the plan
NEAREST = (4, 3)  # bits
OURS, REFINED = '**vitlr, `method="{}"`**', '**vitlr, `method="mix"`, refined**'


def ours(
    model: nn.Module, stats: Statistics, method: str, megabytes: float, spectra: Any
) -> tuple[nn.Module, dict[str, Any], Any]:
    """Rounded to a file of so many megabytes, and read back from that file."""
    start = time.process_time()
    budget = f"bytes:{megabytes * 1e6 - HEADER:.0f}"
    chosen = plan(model, stats, budget, method=method, spectra=spectra)
    small = apply(model, chosen)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        save(small, path, plan=chosen)
        size, small = path.stat().st_size, load(path)
    facts = {"bytes": size, "planned_bytes": chosen.bytes_kept, "predicted_error": chosen.error}
    return (
        small,
        {**facts, "levels": chosen.levels, "ranks": chosen.ranks, "widths": chosen.narrowed, "cpu_seconds": seconds},
        chosen.spectra,
    )


@torch.no_grad()
def nearest(model: nn.Module, stats: Statistics, bits: int) -> tuple[nn.Module, dict[str, Any]]:
    """Plain rounding: bits a weight, a scale in float16 and a zero of as many bits a group."""
    small, size = copy.deepcopy(model), 0.0
    for name in stats.layers:
        weight = small.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(grouped(weight, bits))
        size += weight.numel() * bits / 8 + weight.numel() / GROUP * (2 + bits / 8)
    for tensor in rest(small, stats.layers):
        tensor.copy_(compact.rounded(tensor.detach()))
    return small, {"bytes": round(size + count_rest(small, stats.layers))}


def grouped(weight: Tensor, bits: int) -> Tensor:
    """W rounded in groups of a row, each in the range that loses least of its weights."""
    codes, step, zero = rounded(weight, bits, GROUP)
    return ((codes - zero) * step).flatten(1)


def refined(
    small: nn.Module, model: nn.Module, folder: Path, path: Path, choices: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Distilled from the dense model without labels, to integers again, and read back from its file."""
    start = time.process_time()
    images = open_data(calibration_tar(folder), model, batch_size=50, workers=0)
    with bar("refining", unit="steps") as progress:
        small = refine(small, model, images, rungs="distil", resume=path, progress=progress, **choices)
    report = small.vitlr_refinement
    assert isinstance(report, Refinement)
    seconds = time.process_time() - start
    save(small, path / "small.safetensors")
    facts = {"choices": choices, "refinement": report.to_dict(), "refining_cpu_seconds": seconds}
    return load(path / "small.safetensors"), {**facts, "bytes": (path / "small.safetensors").stat().st_size}


def statistics(model: nn.Module, folder: Path, cache: Path, args: argparse.Namespace) -> Statistics:
    """Of both sides of every linear, of an earlier run where there was one."""
    path = args.stats or cache / f"statistics-{args.images}.safetensors"
    if path.is_file():
        return Statistics.load(path)
    loader = open_data(calibration_tar(folder), model, batch_size=args.batch_size, limit=args.images)
    stats = calibrate(model, loader, objective="loss", extras=("rounding",), hidden=False)
    stats.save(path)
    return stats


def markdown(body: dict[str, Any]) -> str:
    """All rows, as they stand in the docs."""
    dense, facts = body["dense"], body["machine"]
    lines = [
        "# Bits, without any training but where it says so",
        "",
        f"`{body['model']}` ({body['weights']}), {body['calibration_images']} calibration images; accuracy on the "
        f"{body['validation_images']}-image subset of the ILSVRC2012 validation set (easier than the full set: do not "
        f"read it as ImageNet accuracy). Dense: top-1 {_interval(dense)}, {dense['bytes'] / 1e6:.2f} MB. Intervals are "
        "95 % (Wilson); all rows see the same images. KL(dense, small) in nats, agreement: same first class. MB of the "
        "whole file; that of plain rounding is counted, without a header.",
        "",
        f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['torch']}, {facts['date']}; code "
        f"{body['code']}. Made by `python -m bench.compare.bits`; figures and levels in `bits.json`.",
        "",
        "| method | MB | bits a weight of the linears | top-1 (95 %) | top-5 | agreement | KL | predicted |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, body) for row in sorted(body["rows"], key=lambda row: -row["bytes"])),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], body: dict[str, Any]) -> str:
    bits = 8 * (row.get("planned_bytes", row["bytes"]) - body["rest"]) / body["weights_rounded"]
    predicted = f"{row['predicted_error']:.3f}" if "predicted_error" in row else ""
    cells = [row["method"], f"{row['bytes'] / 1e6:.3f}", f"{bits:.2f}", _interval(row)]
    cells += [f"{row['top5']:.2f}", f"{row['agreement']:.2f}", f"{row['kl']:.4f}", predicted]
    return f"| {' | '.join(cells)} |"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['top1']:.2f} ({row['top1_low']:.1f} to {row['top1_high']:.1f})"


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--refined", type=float, metavar="MB", help="refine the model of this size, and add its row")
    args.add_argument("--choice", nargs="*", default=[], type=choice, metavar="KEY=JSON", help="of its recipe")
    args.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), metavar="MB")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--images", type=int, default=1000, help="calibration images")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--batch-size", type=int, default=50)
    return args.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "compare_bits" / CODE
    cache.mkdir(parents=True, exist_ok=True)
    stats = statistics(model, folder, cache, args)
    if args.refined is not None:
        start, facts, _ = ours(model, stats, "mix", args.refined, None)
        small, more = refined(start, model, folder, cache / f"refined-{args.refined:g}", dict(args.choice))
    loader = validation(folder, model, cache / f"validation-{args.limit or 'all'}.pt", args.batch_size, args.limit)
    dense = Recorded(model, loader)
    reference = evaluate(dense, loader)
    print(f"dense: {reference}", file=sys.stderr)
    if args.refined is None:
        rows = _plain_rows(model, stats, args.sizes, loader, dense)
        body = {
            "model": MODEL,
            "weights": CHECKPOINT,
            "calibration_images": stats.images,
            "validation_images": reference.images,
            "code": CODE,
            "machine": machine(),
            "dense": {**reference.to_dict(), "bytes": count_bytes(model)},
            "rest": count_rest(model, stats.layers),
            "weights_rounded": sum(layer.in_features * layer.out_features for layer in stats.layers.values()),
            "rows": rows,
        }
    else:
        body = json.loads((args.out / "bits.json").read_text())
        dense.next = 0
        facts["before"] = evaluate(start, loader, dense).to_dict()
        row = _measured(REFINED, small, {**facts, **more, "code": CODE, "machine": machine()}, loader, dense)
        others = [was for was in body["rows"] if was["method"] != REFINED or was["size"] != args.refined]
        body["rows"] = [*others, {**row, "size": args.refined}]
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    write_json(args.out / "bits.json", body)
    (args.out / "bits.md").write_text(markdown(json.loads(json.dumps(body))))


def _plain_rows(
    model: nn.Module, stats: Statistics, sizes: list[float], loader: Kept, dense: Recorded
) -> list[dict[str, Any]]:
    """The rivals, then ours at all sizes."""
    rows = []
    for bits in NEAREST:
        small, facts = nearest(model, stats, bits)
        rows.append(_measured(f"nearest, {bits} bits, groups of {GROUP}", small, facts, loader, dense))
    spectra = None
    for size in sizes:
        for method in ("mix", "bits"):
            small, facts, known = ours(model, stats, method, size, spectra)
            spectra = spectra or known
            rows.append(_measured(OURS.format(method), small, facts, loader, dense))
    return rows


def _measured(method: str, small: nn.Module, facts: dict[str, Any], loader: Kept, dense: Recorded) -> dict[str, Any]:
    dense.next = 0
    row = {"method": method, **facts, **evaluate(small, loader, dense).to_dict()}
    print(f"{method:<32} {row['bytes']:>9,}  top-1 {row['top1']:6.2f}  KL {row['kl']:7.4f}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main(_arguments())
