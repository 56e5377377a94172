"""Accuracy against milliseconds on ViT-Ti and DINOv2 ViT-S, milliseconds on ViT-B: every engine, and vitlr's plans.

    pip install nncf openvino onnxruntime onnxscript torchao matplotlib
    python -m bench.compare.frontier_time --work DIR --dinov2 FILE --threads 1 --prepare
    python -m bench.compare.frontier_time --work DIR --dinov2 FILE --threads 1 [--cpu-time] [--model NAME ...]

All rows see the same 300 calibration images and are judged by the same others. `--prepare` makes files and accuracies,
which may take hours and does not mind company; without it they are read from the folder, all rows of a model are timed
in turns in one process, and table and figure are written. `--only` without a name makes those alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, write_json
from bench.compare.frontier.__main__ import read
from bench.compare.frontier.subjects import Subject
from bench.compare.frontier_time.figure import draw
from bench.compare.frontier_time.page import markdown
from bench.compare.frontier_time.rows import ROWS, SAME, images
from bench.compare.frontier_time.subjects import ALL
from vitlr.errors import InputError, RunError
from vitlr.measuring import timing
from vitlr.runtime.modules import uncompiled

NAME = "frontier_time"
SIZES = (8, 1)
LEAST, MOST = 4, 60  # rounds


def judge(name: str, runner: nn.Module, subject: Subject, rows: dict[str, Any]) -> dict[str, Any]:
    """What a row's answers are worth, and how many products of bytes its engine makes."""
    same = rows.get(SAME.get(name, ""), {})
    found = same["figures"] if "figures" in same else subject.measured(uncompiled(runner))
    return {"figures": found, "int8": getattr(runner, "int8", None), "code": CODE, "machine": machine()}


def opened(subject: Subject, folder: Path, wanted: list[str], body: dict[str, Any]) -> dict[str, nn.Module]:
    """All rows that can be had, ready to run; those that cannot say why."""
    runners = {}
    for name in wanted:
        try:
            runners[name] = ROWS[name](subject, folder).eval()
        except (InputError, RunError) as cause:
            body["rows"][name] = {"refused": str(cause)}
            print(f"{name:<44} {cause}", file=sys.stderr)
    return runners


def timed(runners: dict[str, nn.Module], shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of every row and batch size: the least of as many rounds as the seconds allow."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    found: dict[str, dict[str, Any]] = {name: {} for name in runners}
    for size in SIZES:
        first = timing.throughput(runners, size, input_size=shape, repeats=1, clock=clock)
        round_ = sum(row["batch_ms"] for row in first.values()) / 1e3
        repeats = max(LEAST, min(MOST, int(args.seconds / round_)))
        rows = timing.throughput(runners, size, input_size=shape, repeats=repeats, warmup=1, clock=clock)
        for name, row in rows.items():
            found[name][str(size)] = {"ms": round(row["batch_ms"], 4), "median": round(row["batch_ms_median"], 4)}
            found[name][str(size)]["rounds"] = repeats
    return found


def of_model(model: str, args: argparse.Namespace, body: dict[str, Any], path: Path) -> dict[str, Any]:
    """The rows of one model, made and judged, or read and timed."""
    folder = args.work / model
    folder.mkdir(parents=True, exist_ok=True)
    subject = ALL[model](data_folder(args.data), folder, args)
    subject.model.eval()
    facts = {"title": subject.title, "key": subject.key, "figures": {k: list(v) for k, v in subject.figures.items()}}
    body = {"rows": {}, **body, **facts, **subject.says, "floor": subject.floor}
    wanted = [name for name in ROWS if not args.only or any(part in name for part in args.only)]
    shape = tuple(images(subject, 1)[0].shape[1:])
    if args.prepare:
        for name in sorted(wanted, key=lambda name: "compiled" in name):  # what takes longest comes last
            if "figures" in body["rows"].get(name, {}) and not args.again:
                continue
            start = time.process_time()
            runners = opened(subject, folder, [name], body)
            for runner in runners.values():
                body["rows"][name] = judge(name, runner, subject, body["rows"])
                for size in SIZES if "compiled" in name else ():  # kept on disk, so that it need not be done again
                    timing.throughput({name: runner}, size, input_size=shape, repeats=1, warmup=1)
            write_json(path, {**read(path), model: body})
            print(f"{model} {name:<44} {time.process_time() - start:.0f} s", file=sys.stderr)
        return body
    runners = opened(subject, folder, [name for name in wanted if "figures" in body["rows"].get(name, {})], body)
    for name, found in timed(runners, shape, args).items():
        body["rows"][name]["times"] = found
    clock = "processor time" if args.cpu_time else "time"
    rows = {name: body["rows"][name] for name in ROWS if name in body["rows"]}
    return {**body, "rows": rows, "clock": clock, "machine": machine(), "code": CODE}


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").resolve()))
    os.environ["XDG_CACHE_HOME"] = str((args.work / "times").resolve())
    torch.set_num_threads(args.threads)
    kept = args.work / f"{NAME}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    for model in args.model if args.only != [] else ():
        start = time.perf_counter()
        of = of_model(model, args, read(kept).get(model, {}), kept)
        write_json(kept, {**read(kept), model: of})  # another run may have written meanwhile
        print(f"{model}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.prepare:
        return
    out = args.out / f"{NAME}.json"
    every = read(kept) or read(out)
    models = [model for model in ALL if any("times" in row for row in every.get(model, {}).get("rows", {}).values())]
    body = {model: every[model] for model in models}
    write_json(out, body)
    (args.out / f"{NAME}.md").write_text(markdown(body))
    draw(body, args.out / f"{NAME}.svg")


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--model", nargs="+", choices=ALL, default=list(ALL))
    args.add_argument("--prepare", action="store_true", help="make files and accuracies, time nothing")
    args.add_argument("--only", nargs="*", metavar="NAME", help="rows whose name holds one of these (default: all)")
    args.add_argument("--again", action="store_true", help="judge rows again that are there")
    args.add_argument("--work", type=Path, default=BUILD / NAME, help="where files and accuracies are kept")
    args.add_argument("--dinov2", type=Path, help="weights written by dinov2_small.py of the data folder")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where figures and table go")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all; of DINOv2 200)")
    args.add_argument("--bank", type=int, default=500, help="images among which nearest neighbours are looked for")
    args.add_argument("--asked", type=int, default=500, help="images whose nearest neighbours are looked for")
    args.add_argument("--cpu-time", action="store_true", help="time of the processor, for a machine that others use")
    args.add_argument("--seconds", type=float, default=45, help="that a batch size of a model is timed for, about")
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
