"""Accuracy against bytes of the file on real models: rivals, plain rounding and vitlr, one table and one figure.

    pip install nncf openvino torchao hqq matplotlib
    python -m bench.compare.frontier [--model vit_tiny] [--only NAME ...] [--again] [--data FOLDER] [--out docs/results]

All see the same 1000 calibration images and are judged by the same others, which nothing was chosen by. A row goes into
frontier.json as soon as it is measured, and is not measured again unless `--again` is said; the table and the figure
are made of whatever rows there are (`--only` without a name makes them alone), those of bits.json among them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.frontier.borrowed import borrowed, merged
from bench.compare.frontier.figure import draw
from bench.compare.frontier.ours import ours
from bench.compare.frontier.page import markdown
from bench.compare.frontier.plain import PLAIN
from bench.compare.frontier.rivals import RIVALS, Make
from bench.compare.frontier.subjects import SUBJECTS, Subject
from vitlr.measuring.cost import count_bytes

TOOLS = ("nncf", "openvino", "torchao", "hqq")
NAME = "frontier"


def measure(subject: Subject, makes: dict[str, Make], folder: Path, args: argparse.Namespace) -> None:
    """Measure what is asked for and not there, and write each row as soon as it is."""
    path = args.out / f"{NAME}.json"
    for name, make in makes.items():
        if name in [row["name"] for row in read(path).get(subject.name, {}).get("rows", [])] and not args.again:
            continue
        start = time.process_time()
        forward, size, more = make(subject, folder)
        seconds = time.process_time() - start
        row = {"name": name, "bytes": size, **subject.measured(forward), **more, "cpu_seconds": round(seconds, 1)}
        row |= {"code": CODE, "machine": machine(), "tools": installed()}
        body = read(path)  # another run may have written meanwhile
        rows = merged(body.get(subject.name, {}).get("rows", []), [row])
        write_json(path, {**body, subject.name: {**facts(subject), "rows": rows}})
        key = subject.key
        print(f"{name:<40} {size:>10,}  {key} {row[key]:.4f}  {seconds:.0f} s", file=sys.stderr)


def facts(subject: Subject) -> dict[str, Any]:
    """What all rows of a model share."""
    return {
        "title": subject.title,
        "key": subject.key,
        "floor": subject.floor,
        "figures": {key: list(of) for key, of in subject.figures.items()},
        "calibration_images": subject.images.images,
        **subject.says,
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def installed() -> dict[str, str]:
    """Versions of the rivals."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def dense(subject: Subject, folder: Path) -> Any:
    """The model as it is."""
    return subject.model, count_bytes(subject.model), {}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    rows = {"dense, float32": dense, **RIVALS, **PLAIN, **ours(args.model)}
    if args.only is not None:
        rows = {name: make for name, make in rows.items() if any(wanted in name for wanted in args.only)}
        if not rows and args.only:
            sys.exit(f"--only {' '.join(args.only)} names no row")
    if rows:
        cache = BUILD / "frontier" / args.model
        cache.mkdir(parents=True, exist_ok=True)
        subject = SUBJECTS[args.model](data_folder(args.data), cache, args)
        measure(subject, rows, cache, args)
    if sources() != CODE:
        print("the code changed while this ran: rows bear the code that they began with", file=sys.stderr)
    body, bits = read(args.out / f"{NAME}.json"), read(args.out / "bits.json")
    if bits and "vit_tiny" in body:
        body["vit_tiny"]["rows"] = merged(body["vit_tiny"]["rows"], borrowed(bits))
        write_json(args.out / f"{NAME}.json", body)
    (args.out / f"{NAME}.md").write_text(markdown(body))
    draw(body, args.out / f"{NAME}.svg")


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--model", choices=SUBJECTS, default="vit_tiny")
    args.add_argument("--only", nargs="*", metavar="NAME", help="rows whose name holds one of these (default: all)")
    args.add_argument("--again", action="store_true", help="measure rows again that are there")
    args.add_argument("--dinov2", type=Path, help="weights written by dinov2_small.py of the data folder")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all; of DINOv2 200)")
    args.add_argument("--bank", type=int, default=300, help="images among which nearest neighbours are looked for")
    args.add_argument("--asked", type=int, default=200, help="images whose nearest neighbours are looked for")
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
