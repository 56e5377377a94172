"""Accuracy against milliseconds: ViT-Ti in torch, OpenVINO and ONNX Runtime, quantised by NNCF and by us, in turns.

    pip install nncf openvino onnxruntime onnxscript matplotlib
    python -m bench.compare.engines [--only NAME ...] [--again] [--data FOLDER] [--out docs/results]

All see the same 300 calibration images and are judged by the same validation images. Models and accuracies are kept, a
row at a time in engines.json, and not made again unless `--again` is said; all rows are timed together, in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitlr
from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, write_json
from bench.compare.engines_figure import draw
from bench.compare.frontier.rivals import SUBSET, converted, data
from bench.compare.frontier.subjects import SUBJECTS, Subject
from vitlr.engines.export import export
from vitlr.engines.running import OnnxRuntime, OpenVino
from vitlr.measuring import timing

NAME = "engines"
TITLES = {"top1": "top-1 (95 %)", "agreement": "agreement", "kl": "KL"}


def calibrated(subject: Subject, folder: Path) -> vitlr.Statistics:
    """Statistics of as many images as NNCF sees, with the ranges of inputs."""

    def write(path: Path) -> None:
        batches = [images for images, _ in subject.images][: SUBSET // 50]
        vitlr.calibrate(subject.model, batches, hidden=False, extras=("ranges",)).save(path)

    return vitlr.Statistics.load(made(folder / "ranges.safetensors", write))


def dense_onnx(subject: Subject, folder: Path) -> Path:
    return made(folder / "dense.onnx", lambda path: export(subject.model, path))


def ours_onnx(subject: Subject, folder: Path) -> Path:
    """Our int8 as QDQ."""

    def write(path: Path) -> None:
        images = next(iter(subject.images))[0][:8]
        export(subject.model, path, bits=8, stats=calibrated(subject, folder), images=images)

    return made(folder / "vitlr.onnx", write)


def nncf_openvino(subject: Subject, folder: Path) -> Path:
    """NNCF's post-training quantisation of OpenVINO's own model."""

    def write(path: Path) -> None:
        import nncf
        import openvino as ov

        how = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": SUBSET}
        ov.save_model(nncf.quantize(converted(subject), data(subject), **how), path, compress_to_fp16=False)

    return made(folder / "nncf.xml", write)


def nncf_onnx(subject: Subject, folder: Path) -> Path:
    """The same of the ONNX model."""

    def write(path: Path) -> None:
        import nncf
        import onnx

        images = nncf.Dataset([{"images": image[None].numpy()} for batch, _ in subject.images for image in batch])
        how = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": SUBSET}
        onnx.save(nncf.quantize(onnx.load(dense_onnx(subject, folder)), images, **how), path)

    return made(folder / "nncf.onnx", write)


def made(path: Path, write: Callable[[Path], Any]) -> Path:
    """The file, made where it is not there."""
    if not path.is_file():
        write(path)
    return path


class In(nn.Module):
    """A model in another dtype, asked in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.dtype)).float()


def kernels(dtype: torch.dtype) -> Callable[[Subject, Path], nn.Module]:
    """Our int8 on our own kernels, the rest in `dtype`."""
    return lambda s, f: In(vitlr.fuse(s.model, bits=8, stats=calibrated(s, f)), dtype)


HALF = "bfloat16"
ROWS: Mapping[str, Callable[[Subject, Path], nn.Module]] = {
    "torch, float32": lambda s, f: s.model,
    "torch, bfloat16": lambda s, f: In(s.model, torch.bfloat16),
    "ONNX Runtime, float32": lambda s, f: OnnxRuntime(dense_onnx(s, f)),
    "OpenVINO, float32": lambda s, f: OpenVino(dense_onnx(s, f)),
    "OpenVINO, bfloat16": lambda s, f: OpenVino(dense_onnx(s, f), precision=HALF),
    "NNCF int8 in ONNX Runtime": lambda s, f: OnnxRuntime(nncf_onnx(s, f)),
    "NNCF int8 in OpenVINO": lambda s, f: OpenVino(nncf_openvino(s, f)),
    "NNCF int8 in OpenVINO, the rest bfloat16": lambda s, f: OpenVino(nncf_openvino(s, f), precision=HALF),
    "vitlr int8 in ONNX Runtime": lambda s, f: OnnxRuntime(ours_onnx(s, f)),
    "vitlr int8 in OpenVINO": lambda s, f: OpenVino(ours_onnx(s, f)),
    "vitlr int8 in OpenVINO, the rest bfloat16": lambda s, f: OpenVino(ours_onnx(s, f), precision=HALF),
    "vitlr int8, own kernels": kernels(torch.float32),
    "vitlr int8, own kernels, the rest bfloat16": kernels(torch.bfloat16),
}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    cache = BUILD / "frontier" / "vit_tiny"
    folder = cache / NAME
    folder.mkdir(parents=True, exist_ok=True)
    subject = SUBJECTS["vit_tiny"](data_folder(args.data), cache, args)
    subject.model.eval()
    path = args.out / f"{NAME}.json"
    body: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    runners = {}
    for name, make in ROWS.items():
        if args.only and not any(wanted in name for wanted in args.only):
            continue
        runners[name] = make(subject, folder)
        row = body["rows"].get(name, {})
        if args.again or "kl" not in row:
            said = iter(subject.expected.split([len(labels) for _, labels in subject.validation]))  # the model's own
            judged = (lambda x: next(said)) if runners[name] is subject.model else runners[name]  # noqa: B023
            found = {"int8": getattr(runners[name], "int8", None), **subject.measured(judged)}
            body["rows"][name] = {**row, **found, "code": CODE, "machine": machine()}
            write_json(path, body)
            print(f"{name:<44} top-1 {found['top1']:.2f}, KL {found['kl']:.4f}", file=sys.stderr)
    for size in args.batch_sizes:
        clock = time.process_time if args.cpu_time else time.perf_counter
        times = timing.throughput(runners, size, input_size=(3, 224, 224), repeats=args.repeats, clock=clock)
        for name, found in times.items():
            body["rows"][name].setdefault("ms", {})[str(size)] = found["batch_ms"]
    body |= {"judged_on": subject.says["judged_on"], "machine": machine(), "repeats": args.repeats}
    body["clock"] = "processor time" if args.cpu_time else "time"
    write_json(path, body)
    (args.out / f"{NAME}.md").write_text(markdown(body))
    draw(body["rows"], args.out / f"{NAME}.svg")


def markdown(body: Mapping[str, Any]) -> str:
    """Accuracies, and times as ratios to the first row's."""
    facts, rows = body["machine"], {name: body["rows"][name] for name in ROWS if name in body["rows"]}
    timed = {name: row for name, row in rows.items() if "ms" in row}
    sizes = list(next(iter(timed.values()))["ms"]) if timed else []
    base = timed.get(next(iter(ROWS)))
    heads = ["ViT-Ti/16 in", *TITLES.values(), *(f"times as fast, batch {size}" for size in sizes)]
    lines = [
        "# Accuracy against milliseconds",
        "",
        f"300 calibration images without labels; judged on {body['judged_on']}. KL(dense, this) in nats. Speed over "
        f"plain torch in float32, in turns in one process: {body['clock']}, the least of {body['repeats']}; "
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}. Made by "
        "`python -m bench.compare.engines`.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for name, row in rows.items():
        cells = [name, f"{row['top1']:.2f} ({row['top1_low']:.1f} to {row['top1_high']:.1f})"]
        cells += [f"{row['agreement']:.2f}", f"{row['kl']:.4f}"]
        cells += [f"{base['ms'][size] / row['ms'][size]:.2f}" if base and "ms" in row else "" for size in sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--only", nargs="*", metavar="NAME", help="rows whose name holds one of these (default: all)")
    args.add_argument("--again", action="store_true", help="judge rows again that are there")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where figures and table go")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1], help="images at once, in turn")
    args.add_argument("--cpu-time", action="store_true", help="time of the processor, for a machine that others use")
    args.add_argument("--repeats", type=int, default=20, help="measurements of each; the fastest counts")
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
