"""Installable peers against ours on the real ViT-Ti, without fine-tuning: same images, same number of parameters.

    pip install ptdeco torch-pruning
    python -m bench.compare.peers [--data FOLDER] [--budgets 90 80 60] [--peers ...] [--stats FILE] [--out docs/results]

torch-pruning (structured pruning; magnitude, Taylor and isomorphic Taylor, with and without the embedding) is given
the pruning ratio that just fits a budget. ptdeco (falor, dwain) takes thresholds and no budget, so it says how small
the model becomes, and ours is planned for exactly that many parameters. All see the 1000 calibration images; peers that
want labels get them, ours takes none. Accuracy is that on the 1300 validation images, once a row. Finished rows are
kept in bench/build under a digest of the code, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.vit_tiny import CHECKPOINT, MODEL, Kept, Recorded, calibration, validation, weights_digest
from vitlr import Statistics, apply, calibrate, create_model, evaluate, plan
from vitlr.calibration.options import DEFAULT, OBJECTIVES
from vitlr.measuring.cost import count_params

Make = Callable[[nn.Module, Kept, float], nn.Module]


def torch_pruning(importance: str, **choices: Any) -> Make:
    """Structured pruning by the dependency graph, with the largest model that fits the budget (a share of parameters).

    `bottleneck` leaves the embedding alone, `isomorphic` ranks within isomorphic groups (arXiv 2407.04616).
    """

    def make(model: nn.Module, images: Kept, share: float) -> nn.Module:
        import torch_pruning as tp

        limit = share * count_params(model)
        kind = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
        gradients = _gradients(model, images) if importance == "taylor" else []

        def pruned(ratio: float) -> nn.Module:
            small = copy.deepcopy(model).requires_grad_(True)
            for p, gradient in zip(small.parameters(), gradients, strict=False):
                p.grad = gradient.clone()
            _prune(small, tp, kind[importance](), ratio, next(iter(images))[0][:1], **choices)
            return small

        low, high, best = 0.0, 0.9, None
        for _ in range(10):
            ratio = (low + high) / 2
            small = pruned(ratio)
            if count_params(small) > limit:
                low = ratio
            else:
                high, best = ratio, small
        if best is None:
            sys.exit(f"torch-pruning, {importance}: no pruning ratio reaches {share:.0%} of the parameters")
        return best.requires_grad_(False)

    return make


_GRADIENTS: dict[int, list[Tensor]] = {}  # of the dense model, by the images: all budgets and criteria need the same


def _gradients(model: nn.Module, images: Kept) -> list[Tensor]:
    """The gradient of the mean cross entropy with the true labels over all calibration images."""
    if id(images) not in _GRADIENTS:
        model = copy.deepcopy(model).requires_grad_(True)
        for batch, labels in images:
            F.cross_entropy(model(batch), labels, reduction="sum").div(images.images).backward()
        _GRADIENTS[id(images)] = [p.grad for p in model.parameters() if p.grad is not None]
    return _GRADIENTS[id(images)]


def _prune(
    model: nn.Module, tp: Any, importance: Any, ratio: float, example: Tensor, *, bottleneck: bool, isomorphic: bool
) -> None:
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, Attention)}
    ignored: list[nn.Module] = [model.head]
    if bottleneck:  # layers that write to the embedding keep their outputs
        ignored += [m.fc2 for m in model.modules() if isinstance(m, Mlp)]
        ignored += [m.proj for m in model.modules() if isinstance(m, Attention)]
        ignored.append(model.patch_embed.proj)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=isomorphic,
        isomorphic=isomorphic,
        ignored_layers=ignored,
        num_heads=heads,
        prune_head_dims=True,
        max_pruning_ratio=0.95,
        round_to=2,
    )
    pruner.step()
    for m in model.modules():
        if isinstance(m, Attention):
            m.num_heads = pruner.num_heads[m.qkv]
            m.head_dim = m.qkv.out_features // (3 * m.num_heads)
            m.attn_dim = m.num_heads * m.head_dim


class _Named(nn.Module):
    """A model that takes ptdeco's dict of inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["inputs"])


def _batches(images: Kept, size: int) -> Iterator[dict[str, Tensor]]:
    for pixels, labels in itertools.cycle(images):
        for part, of in zip(pixels.split(size), labels.split(size), strict=True):
            yield {"inputs": part, "labels": of}


def dwain(model: nn.Module, images: Kept, trade_off: float) -> nn.Module:
    """ptdeco's dwain: output PCA, layer after layer from the end, ranks halved while the loss allows it."""
    import ptdeco.dwain

    ptdeco.dwain.decompose_in_place(
        module=_Named(model),
        device=torch.device("cpu"),
        data_iterator=_batches(images, 50),
        loss_fn=lambda batch, answers: F.cross_entropy(answers, batch["labels"]),
        num_data_steps=images.images // 50,
        metric_iterator=_batches(images, ARGS.metric_images),
        num_metric_steps=1,
        nsr_final_threshold=1.0,
        ppl_diff_threshold=0.005,
        finetune_fn=lambda m, device, names: m,
        min_rank=4,
        trade_off_factor=trade_off,
        decompose_in_float64=True,
        precomputing_covariance_num_splits=1,
    )
    return model


def falor(model: nn.Module, images: Kept, threshold: float) -> nn.Module:
    """ptdeco's falor: output PCA, the smallest rank of each layer whose KL divergence stays below the threshold."""
    import ptdeco.falor

    ptdeco.falor.decompose_in_place(
        module=model,
        device=torch.device("cpu"),
        data_iterator=(batch["inputs"] for batch in _batches(images, ARGS.metric_images)),
        proportion_threshold=1.0,
        nsr_final_threshold=1e9,
        kl_final_threshold=threshold,
        num_data_steps=ARGS.falor_steps,
        num_metric_steps=1,
        use_float64=True,
        use_mean=True,
        use_damping=True,
    )
    return model


STRUCTURED: dict[str, Make] = {
    "torch-pruning, magnitude": torch_pruning("magnitude", bottleneck=False, isomorphic=False),
    "torch-pruning, Taylor": torch_pruning("taylor", bottleneck=False, isomorphic=False),
    "torch-pruning, isomorphic Taylor": torch_pruning("taylor", bottleneck=False, isomorphic=True),
    "torch-pruning, isomorphic Taylor, embedding kept": torch_pruning("taylor", bottleneck=True, isomorphic=True),
}
OURS = {"lowrank": "vitlr, ranks", "joint": "**vitlr, ranks and widths (joint)**"}
BY_THRESHOLD: dict[str, tuple[Make, str]] = {"ptdeco, dwain": (dwain, "trade_off"), "ptdeco, falor": (falor, "kl")}


class Table:
    """Rows, computed or read from an earlier run of the same code."""

    def __init__(self, model: nn.Module, folder: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.images = calibration(folder, model, cache.parent / "calibration.pt")
        self.validation = validation(
            folder, model, cache.parent / f"validation-{ARGS.limit or 'all'}.pt", 50, ARGS.limit
        )
        self.dense = Recorded(model, self.validation)
        self.reference = evaluate(self.dense, self.validation)
        self.rows: list[dict[str, Any]] = []
        self._stats: Statistics | None = None

    def add(self, method: str, budget: str, make: Callable[[], nn.Module]) -> dict[str, Any]:
        path = self.cache / f"{method}-{budget}.json".replace(" ", "_").replace("*", "")
        if not path.is_file():
            start = time.process_time()
            small = make().eval()
            seconds = time.process_time() - start
            self.dense.next = 0
            metrics = evaluate(small, self.validation, self.dense).to_dict()
            params = count_params(small)
            facts = {"method": method, "budget": budget, "params": params, "kept": params / count_params(self.model)}
            facts["code"] = CODE
            write_json(path, {**facts, **metrics, "seconds": seconds})
        self.rows.append(json.loads(path.read_text()))
        r = self.rows[-1]
        print(f"{method:<50} {budget:<14} {r['kept']:.1%}  top-1 {r['top1']:.2f}  KL {r['kl']:.3f}", file=sys.stderr)
        return r

    def ours(self, budget: str) -> None:
        for method, name in OURS.items():
            choices: dict[str, Any] = {"objective": ARGS.objective, "method": method, "rank_step": 1}
            self.add(name, budget, lambda c=choices: apply(self.model, plan(self.model, self.stats(), budget, **c)))

    def stats(self) -> Statistics:
        if self._stats is None:
            path = ARGS.stats or self.cache.parent / f"statistics-{ARGS.objective}-3.safetensors"
            if not path.is_file():
                images = (x for x, _ in self.images)
                calibrate(self.model, images, objective=ARGS.objective, samples=3, hidden=True).save(path)
            self._stats = Statistics.load(path)
        return self._stats


def markdown(body: dict[str, Any]) -> str:
    """The table for the docs."""
    dense, facts, ptdeco = body["dense"], body["machine"], body["ptdeco"]
    versions = ", ".join(f"{name} {version}" for name, version in body["peers"].items())
    lines = [
        "# Installable peers, without fine-tuning",
        "",
        f"`{body['model']}`, {body['calibration_images']} calibration images (with labels for the peers that want "
        f"them), top-1 on the {dense['images']}-image subset of the ILSVRC2012 validation set (easier than the full "
        f"set). Dense: {dense['top1']:.2f}, {dense['params']:,} parameters. {versions}. Intervals are 95 % "
        f"(Wilson). Seconds of "
        f"processor time to make the model (ours: without calibration), {facts['processor']}, {facts['threads']} "
        f"thread(s), torch {facts['torch']}, {facts['date']}. Ours: objective {body['objective']}, 3 drawn targets, "
        "rank step 1, widths in steps of 16. torch-pruning is made to be followed by fine-tuning, "
        "which nothing here has had; ptdeco chooses its own size from a threshold (judged on "
        f"{ptdeco['metric_images']} images, falor's covariances from {ptdeco['falor_steps']} batches of as many), "
        "and ours beside it is planned for that size.",
        "",
        f"Made by `python -m bench.compare.peers`, code {', '.join(sorted({r['code'] for r in body['rows']}))}.",
        "",
        "| budget | method | parameters kept | top-1 (95 %) | agreement | KL | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['budget']} | {r['method']} | {r['kept']:.1%} | {r['top1']:.2f} "
        f"({r['top1_low']:.1f} to {r['top1_high']:.1f}) | {r['agreement']:.2f} | {r['kl']:.3f} | {r['seconds']:.0f} |"
        for r in body["rows"]
    ]
    return "\n".join(lines) + "\n"


def _installed(peers: list[str]) -> dict[str, str]:
    found = {}
    for distribution in dict.fromkeys(peer.partition(",")[0] for peer in peers):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{distribution} is not installed: pip install {distribution}, or leave it out of --peers")
    return found


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    peers = _installed(ARGS.peers)
    folder = data_folder(ARGS.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "compare_peers" / f"{weights_digest(model)}-{CODE}" / "rows"
    cache.mkdir(parents=True, exist_ok=True)
    table = Table(model, folder, cache)
    for budget in ARGS.budgets:
        table.ours(f"params:{budget:g}%")
        for peer in ARGS.peers:
            if peer in STRUCTURED:
                make = STRUCTURED[peer]
                table.add(
                    peer, f"params:{budget:g}%", lambda m=make, b=budget: m(copy.deepcopy(model), table.images, b / 100)
                )
    for peer in ARGS.peers:
        if peer in BY_THRESHOLD:
            make, key = BY_THRESHOLD[peer]
            for value in getattr(ARGS, key):
                row = table.add(
                    peer, f"{key}={value:g}", lambda m=make, v=value: m(copy.deepcopy(model), table.images, v)
                )
                table.ours(f"params:{row['params']}")
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    body = {
        "model": MODEL,
        "calibration_images": table.images.images,
        "peers": peers,
        "objective": ARGS.objective,
        "ptdeco": {"metric_images": ARGS.metric_images, "falor_steps": ARGS.falor_steps},
        "code": CODE,
        "machine": machine(),
        "dense": {**table.reference.to_dict(), "params": count_params(model)},
        "rows": table.rows,
    }
    write_json(ARGS.json or ARGS.out / "compare_peers.json", body)
    (ARGS.out / "compare_peers.md").write_text(markdown(body))
    print(markdown(body))


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    known = [*STRUCTURED, *BY_THRESHOLD]
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--budgets", type=float, nargs="*", default=[90, 80, 60], help="percent of parameters kept")
    args.add_argument("--peers", nargs="*", choices=known, default=known, metavar="PEER", help="; ".join(known))
    args.add_argument("--trade-off", type=float, nargs="*", default=[0.5], help="trade_off_factor of dwain")
    args.add_argument("--kl", type=float, nargs="*", default=[0.01], help="kl_final_threshold of falor")
    args.add_argument("--metric-images", type=int, default=16, help="images on which ptdeco judges a rank")
    args.add_argument("--falor-steps", type=int, default=12, help="batches of as many images for falor's covariance")
    args.add_argument("--objective", choices=OBJECTIVES, default=DEFAULT, help="of our rows")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run for our rows")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    return args.parse_args()


if __name__ == "__main__":
    ARGS = _arguments()
    main()
