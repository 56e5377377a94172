"""Published methods against ours on the real ViT-Ti, without any training: one table, Markdown and JSON.

    python bench/compare_methods.py [--data FOLDER] [--budgets 90 80 70 60 50] [--methods ...] [--out docs/results]

One calibration over the calibration images serves every method. Each method gives spectra; each is then planned with
uniform ranks (every layer keeps the same share) and with our allocation (the knapsack over its own energies), applied,
and evaluated on images that calibration never saw. Statistics, decoded images and finished rows are kept in
bench/build under a digest of the code, so that an interrupted run goes on where it stopped but never mixes figures of
two versions; a tree that changes during a run gives no table. --fresh starts over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from compare_tables import markdown
from torch import Tensor, nn

from vitlr.baselines import BASELINES
from vitlr.calibration import calibrate
from vitlr.cost import count_params
from vitlr.data import open_data
from vitlr.decomposition import decompose
from vitlr.evaluation import Metrics, evaluate
from vitlr.models import create_model
from vitlr.pipeline import apply, plan
from vitlr.spectra import Spectra
from vitlr.statistics import EXTRAS, OBJECTIVES, Statistics

MODEL = "vit_tiny_patch16_224"
CHECKPOINT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
METHODS: dict[str, Callable[[nn.Module, Statistics], Spectra]] = {
    **BASELINES,
    **{f"vitlr-{o}": lambda model, stats, o=o: decompose(model, stats, o) for o in OBJECTIVES},
}
# At rank step 16 uniform ranks leave 4 points of a budget unspent, so all are compared at 1; 16 is plan's default.
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"uniform": True, "rank_step": 1},
    "allocated": {"rank_step": 1},
    "allocated-16": {"rank_step": 16},
}


class Kept:
    """Decoded batches in memory as bytes; a pass gives the loader's floats bit for bit (checked on decoding)."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor, skipped: int) -> None:
        self.batches, self.mean, self.std, self.skipped = batches, mean, std, skipped
        self.images = sum(len(labels) for _, labels in batches) + skipped

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self.batches:
            yield self._floats(pixels), labels

    def _floats(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    @classmethod
    def load(cls, path: Path, open_loader: Callable[[], Any], model: nn.Module) -> Kept:
        """Read the cache, or decode once and write it."""
        from vitlr.data import data_config

        config = data_config(model)
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        if path.is_file():
            body = torch.load(path, weights_only=True)
            return cls(body["batches"], mean, std, body["skipped"])
        loader = open_loader()
        kept = cls([], mean, std, 0)
        for images, labels in loader:
            pixels = ((images * std + mean) * 255).round().to(torch.uint8)
            if not torch.equal(kept._floats(pixels), images):
                sys.exit(
                    "the transform of this model is more than bytes, scaled and shifted; its images cannot be kept so"
                )
            kept.batches.append((pixels, labels))
        kept.skipped = loader.skipped
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"batches": kept.batches, "skipped": kept.skipped}, path)
        return cls(kept.batches, mean, std, kept.skipped)


class Recorded(nn.Module):
    """Answers batch after batch with logits that were computed before: the dense model runs once, not once a row."""

    def __init__(self, model: nn.Module, loader: Kept) -> None:
        super().__init__()
        with torch.inference_mode():
            self.logits = [model(images) for images, _ in loader]
        self.next = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits[self.next % len(self.logits)]
        self.next += 1
        return logits


def row(
    method: str,
    allocation: str,
    budget: str,
    model: nn.Module,
    stats: Statistics,
    spectra: Spectra,
    loader: Kept,
    dense: Recorded,
) -> dict[str, Any]:
    """Plan, apply and evaluate one method under one budget."""
    start = time.perf_counter()
    chosen = plan(model, stats, budget, spectra=spectra, **ALLOCATIONS[allocation])
    small = apply(model, chosen)
    seconds = time.perf_counter() - start
    dense.next = 0
    metrics = evaluate(small, loader, dense)
    return {
        "method": method,
        "allocation": allocation,
        "budget": budget,
        **metrics.to_dict(),
        "params": count_params(small),
        "params_kept": count_params(small) / chosen.params,
        "macs_kept": chosen.macs_kept / chosen.macs,
        "predicted_error": chosen.error,
        "ranks": chosen.ranks,
        "seconds": seconds,
    }


def statistics(model: nn.Module, folder: Path, cache: Path) -> tuple[Statistics, float]:
    """Everything that any method needs, in one pass over the calibration images; seconds it took (when it ran)."""
    path = cache / f"statistics-{ARGS.images}-{ARGS.samples}-{ARGS.seed}.safetensors"
    took = path.with_suffix(".seconds.json")
    if path.is_file() and took.is_file():
        return Statistics.load(path), json.loads(took.read_text())
    loader = open_data(folder / "imagenet_calibration_1000.tar", model, batch_size=ARGS.batch_size, limit=ARGS.images)
    start = time.perf_counter()
    draws = {"samples": ARGS.samples, "seed": ARGS.seed}
    stats = calibrate(model, loader, objective=OBJECTIVES, extras=EXTRAS, progress=_say("calibrating"), **draws)
    seconds = time.perf_counter() - start
    stats.save(path)
    took.write_text(json.dumps(seconds))
    return stats, seconds


def _say(what: str) -> Callable[[int, int | None], None]:
    return lambda done, total: print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def _weights(model: nn.Module) -> str:
    """A name for the weights that the cached files belong to."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument(
        "--budgets", type=float, nargs="+", default=[90, 80, 70, 60, 50], help="percent of parameters kept"
    )
    args.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    args.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    args.add_argument("--images", type=int, default=1000, help="calibration images")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--batch-size", type=int, default=50)
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--seed", type=int, default=0, help="of the targets drawn for the gradient moments")
    args.add_argument("--fresh", action="store_true", help="forget what earlier runs kept")
    return args.parse_args()


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    folder = data_folder(ARGS.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "compare_methods" / f"{_weights(model)}-{CODE}"
    if ARGS.fresh:
        shutil.rmtree(cache, ignore_errors=True)
    finished = cache / f"rows-{ARGS.images}-{ARGS.samples}-{ARGS.seed}-{ARGS.limit or 'all'}"
    finished.mkdir(parents=True, exist_ok=True)
    stats, calibration_seconds = statistics(model, folder, cache)
    tar, synsets = folder / "imagenet_validation_1300.tar", folder / "imagenet_synsets.txt"

    def images() -> Any:
        return open_data(tar, model, class_map=synsets, batch_size=ARGS.batch_size, limit=ARGS.limit, need_labels=True)

    loader = Kept.load(cache / f"validation-{ARGS.limit or 'all'}.pt", images, model)
    dense = Recorded(model, loader)
    reference: Metrics = evaluate(dense, loader)
    print(f"dense: {reference}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for method in ARGS.methods:
        spectra, seconds = None, 0.0
        for budget, allocation in product((f"params:{b:g}%" for b in ARGS.budgets), ARGS.allocations):
            if allocation == "allocated-16" and method != "vitlr-loss":
                continue  # what a user gets by default; the others are compared at equal steps
            path = finished / f"{method}-{allocation}-{budget.replace(':', '_')}.json"
            if not path.is_file():
                if spectra is None:
                    start = time.perf_counter()
                    spectra = METHODS[method](model, stats)
                    seconds = time.perf_counter() - start
                found = row(method, allocation, budget, model, stats, spectra, loader, dense)
                write_json(path, {**found, "decompose_seconds": seconds})
            rows.append(json.loads(path.read_text()))
            r = rows[-1]
            print(f"{method:<17} {allocation:<9} {budget:<11} top-1 {r['top1']:6.2f}  agreement {r['agreement']:6.2f}  "
                  f"KL {r['kl']:7.4f}  params {r['params_kept']:.2%}", file=sys.stderr)  # fmt: skip
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    body = {
        "model": MODEL,
        "weights": CHECKPOINT,
        "calibration_images": stats.images,
        "calibration_seconds": calibration_seconds,
        "validation_images": reference.images,
        "code": CODE,
        "samples": ARGS.samples,
        "seed": ARGS.seed,
        "machine": machine(),
        "dense": {**reference.to_dict(), "params": count_params(model)},
        "rows": rows,
    }
    write_json(ARGS.json or ARGS.out / "compare_methods.json", body)
    (ARGS.out / "compare_methods.md").write_text(markdown(body))
    print(markdown(body))


if __name__ == "__main__":
    ARGS = _arguments()
    main()
