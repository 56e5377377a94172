"""What works with which model: docs/models.md, made by trying every family at a small size with random weights.

    python -m bench.models [--only NAME ...] [--quick] [--json docs/results/models.json]

All families, or those named by `--only`, whose rows then stand in the place of what was there. Accuracy is no part.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import vitlr
from bench.common import ROOT, parser, write_json
from bench.families import families
from bench.families.family import Family
from vitlr.anatomy import linears, mlps, visibility
from vitlr.anatomy.attention import attentions, why_no_scores
from vitlr.data.batches import call, first_tensor
from vitlr.measuring.cost import count_params
from vitlr.nn import FusedPatches
from vitlr.nn._fused import StandIn
from vitlr.nn.multihead_linears import MultiheadLinears
from vitlr.nn.window_linears import WindowLinears
from vitlr.runtime.modules import class_of
from vitlr.runtime.words import one_line

RESULTS, PAGE = ROOT / "docs" / "results" / "models.json", ROOT / "docs" / "models.md"
IMAGES, STEP = 48, 4
BUDGETS = {"lowrank": "params:90%", "joint": "params:90%", "bits": "bytes:40%"}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
WORDS = 240  # characters of a reason
HEAD = f"""# Models

Every family at a small size with random weights, through all that vitlr does: what works, not how accurate it is.
Made by `python -m bench.models`; a number in brackets points to the reason, in the words of who refused.

- reach: the share of the parameters that lies in layers which can be made smaller;
- ranks, widths, bits: `method="lowrank"` and `"joint"` at `{BUDGETS["joint"]}`, `"bits"` at
  `{BUDGETS["bits"]}`. Widths are those of hidden neurons (MLPs) and of queries and keys (q·k): of how
  many of those that are there; where no MLP can get narrower a joint plan takes ranks alone, and says so;
- file: whether `vitlr.load` rebuilds the compressed model from its file alone, or needs `model=` (torchvision's Swin
  and MaxViT do at sizes other than those that torchvision has names for);
- fuse: what `vitlr.fuse` makes of a model whose every layer has half its rank; `FusedBiasedAttention` is attention
  under a bias of positions (Swin, BEiT, SAM, MaxViT, MViTv2, Data2Vec) or with fewer keys (SegFormer). Of transformers'
  blocks whose two linears lie in two modules only the attention is gathered. torch's own attention needs none: what
  stands for it while it is compressed runs by the same kernel as it is, torchvision's in windows too;
- ONNX: whether the compressed model was written and ONNX Runtime answers as it does; compile: whether
  `torch.compile(fullgraph=True)` takes it; empty where that was not tried.
"""
COLUMNS = {
    "reach": "reach",
    "lowrank": "ranks",
    "joint": "widths",
    "bits": "bits",
    "load": "file",
    "fuse": "fuse",
    "onnx": "ONNX",
    "compile": "compile",
}
SLOW = ("onnx", "compile")
PASSED = "the answer does not depend on all of its linears, which stay dense"
NOTHING_THERE = "no module of its own is a whole attention or an MLP of linears, which is what fuse gathers"
FEW = f"it has as many hidden neurons as tokens were seen on {IMAGES} images; on more it gets narrower"
# What `fuse` leaves as it is, by the end of its class's name, and why.
CHANNELS = "attends to channels in place of tokens"
NO_SCORES = "has no softmax of scores"
LEVIT = "has norms behind its linears, and values wider than its queries and keys"
TORCH = "runs by torch's own kernel as it is: nothing of ours is written for its windows or fewer keys"
ONE_QUERY = "has one query, which costs next to nothing"
STAYS = {
    "cait.TalkingHeadAttn": "mixes its heads before and after the softmax",
    "cait.ClassAttn": ONE_QUERY,
    "crossvit.CrossAttention": ONE_QUERY,
    "AttentionPoolLatent": ONE_QUERY,
    "XCA": CHANNELS,
    "davit.ChannelAttention": CHANNELS,
    "CrossCovarianceAttn": CHANNELS,
    "FactorAttnConvRelPosEnc": NO_SCORES,
    "LinearSelfAttention": NO_SCORES,
    "LiteMLA": NO_SCORES,
    "MaskUnitAttention": "takes the largest of several queries",
    "Attention2d": "works on images of channels, heads first",
    "levit.Attention": LEVIT,
    "LevitAttention": LEVIT,
    "CascadedGroupAttention": "runs head after head, each fed by the one before",
    "pvt_v2.Attention": TORCH,
    "LocallyGroupedAttn": TORCH,
    "davit.WindowAttention": TORCH,
    "PvtV2SelfAttention": "multiplies matrices itself, with fewer keys, for which nothing of ours is written",
    "VitDetAttention": "multiplies matrices itself, over images of channels, for which nothing of ours is written",
    "MobileViTSelfAttention": "multiplies matrices itself, on pixels of patches, for which nothing of ours is written",
    "RelativePositionalMultiHeadAttention": "multiplies matrices itself, for which nothing of ours is written",
}
Cell = list[str]
"""What stands in a cell, and the reasons behind it."""


class Trial:
    """One family through all that vitlr does."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.model = family.make()
        self.images = torch.randn(IMAGES, *family.shape, generator=torch.Generator().manual_seed(1))
        self.stats: vitlr.Statistics | None = None
        self.small: nn.Module | None = None

    def answers(self, model: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return first_tensor(call(model, self.images[:2])).clone()

    def row(self, quick: bool) -> dict[str, Cell]:
        found = {"reach": said(self.reach)}
        if self.stats is None:
            return found
        for key in ("lowrank", "joint", "bits", "load", "fuse", *(() if quick else SLOW)):
            if key in BUDGETS or self.small is not None:
                found[key] = said(getattr(self, key))
        return found

    def reach(self) -> Cell:
        """The share of all parameters that compression can make smaller, and why others cannot be."""
        batches = list(self.images.split(8))
        self.stats = vitlr.calibrate(self.model, batches, extras=("rounding",))
        reached = sum(layer.in_features * layer.out_features for layer in self.stats.layers.values())
        with visibility.visible(self.model):
            hidden = {of.reason for of in linears.hidden(self.model).values()}
        return [f"{100 * reached / count_params(self.model):.0f} %", *sorted(hidden)]

    def lowrank(self) -> Cell:
        self.small = self._compressed("lowrank")[0]
        return ["yes"]

    def joint(self) -> Cell:
        """Of how many MLPs and attentions widths can be chosen, and why not of the others."""
        with visibility.visible(self.model):
            known, refused = mlps.find_mlps(self.model), mlps.refused_mlps(self.model)
            heads, why = attentions(self.model)[0], why_no_scores(self.model)
            widths = {name: mlp.width for name, mlp in known.items()}
        reasons = [
            reason.partition("keeps its width: ")[2].partition(". Supported")[0] or reason
            for reason in refused.values()
        ]
        reasons += [] if known or refused else ["it has no MLP"]
        small, plan = self._compressed("joint")
        self.small = small  # the other columns are asked of the last of these two
        chosen = Counter(row.kind for row in plan.widths)
        parts = [f"{chosen['mlp']} of {len(known) + len(refused)} MLPs"] if known or refused else []
        assert self.stats is not None
        for name in sorted(known.keys() - {row.name for row in plan.widths}):
            passed = not self.stats.layers.keys() >= set(known[name].linears)
            reasons.append(PASSED if passed else self._too_few(known[name], widths[name]))
        if heads or why:
            parts.append(f"{chosen['query_keys']} of {len(heads.keys() | why.keys())} q·k")
            reasons += [reason.partition(". Supported")[0] for reason in why.values()]
        return [", ".join(parts) or "none", *dict.fromkeys(reasons)]

    def _too_few(self, mlp: mlps.Mlp, width: int) -> str:
        """Why nothing is known of an MLP's hidden neurons: it has more than tokens were seen, or still ones."""
        assert self.stats is not None
        tokens = self.stats.layers[mlp.linears[-1]].tokens
        return FEW if tokens <= width else "its hidden neurons hardly differ from token to token"

    def bits(self) -> Cell:
        self._compressed("bits")
        return ["yes"]

    def _compressed(self, method: str) -> tuple[nn.Module, vitlr.Plan]:
        plan = vitlr.plan(self.model, self.stats, BUDGETS[method], method=method, rank_step=STEP)
        small = vitlr.apply(self.model, plan)
        if torch.equal(self.answers(small), self.answers(self.model)):
            raise AssertionError("the answer does not change")
        return small, plan

    def load(self) -> Cell:
        assert self.small is not None
        expected, path = self.answers(self.small), self.folder / "small.safetensors"
        try:
            vitlr.save(self.small, path, model_args=self.family.arguments)
            alone, reason = vitlr.load(path), ""
        except vitlr.InputError as cause:
            vitlr.save(self.small, path, model_args=False)
            alone, reason = vitlr.load(path, model=self.family.make()), short(cause)
        assert torch.equal(self.answers(alone), expected), "it answers otherwise"
        return ["with `model=`", reason.removeprefix(f"{path}: ")] if reason else ["alone"]

    def fuse(self) -> Cell:
        """How many modules of each kind stand for what, where every layer has half its rank."""
        assert self.stats is not None
        ranks = {layer.name: max(1, layer.size // 2) for layer in self.stats.layers.values()}
        small = vitlr.apply(self.model, vitlr.plan(self.model, self.stats, ranks=ranks))
        fused = vitlr.fuse(small)
        torch.testing.assert_close(self.answers(fused), self.answers(small), **CLOSE)
        modules = (m for m in fused.modules() if isinstance(m, StandIn) and not isinstance(m, FusedPatches))
        kinds = Counter(type(module).__name__ for module in modules)  # patches have no rank
        classes = dict.fromkeys(class_of(module) for module in fused.modules())
        stay = [f"{of.rpartition('.')[2]} {why}" for of in classes for end, why in STAYS.items() if of.endswith(end)]
        stay += [] if kinds or stay or torch_attends(fused) else [NOTHING_THERE]
        return [", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing", *stay]

    def onnx(self) -> Cell:
        assert self.small is not None
        if self.images.ndim != 4:
            return ["not tried", "its inputs are no images [B, C, H, W]"]
        vitlr.export(self.small, self.folder / "small.onnx", images=self.images[:2])
        return ["yes"]

    def compile(self) -> Cell:
        assert self.small is not None
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(self.small), backend="eager", fullgraph=True)
        torch.testing.assert_close(self.answers(compiled), self.answers(self.small), **CLOSE)
        return ["yes"]


def torch_attends(model: nn.Module) -> bool:
    """Whether torch's own attention is there, or what stands for it while it is compressed, which need no other."""
    kinds = nn.MultiheadAttention, MultiheadLinears, WindowLinears
    return any(isinstance(module, kinds) for module in model.modules())


def said(attempt: Callable[[], Cell]) -> Cell:
    try:
        return attempt()
    except Exception as cause:  # whatever a library raises is what its user would see
        return ["no", short(cause)]


def short(cause: Exception) -> str:
    return one_line(cause, WORDS)


def page(rows: dict[str, dict[str, Cell]]) -> str:
    """The table, and under it the reasons behind its numbers."""
    reasons: list[str] = []
    lines = ["| family | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(key, [""]), reasons) for key in COLUMNS) + " |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD, *lines, "", "## Reasons", "", *notes, ""])


def cell(found: Cell, reasons: list[str]) -> str:
    """The answer, and numbers under which the reasons are written out."""
    for reason in found[1:]:
        if reason not in reasons:
            reasons.append(reason)
    numbers = ", ".join(str(reasons.index(reason) + 1) for reason in found[1:])
    return f"{found[0]} ({numbers})" if numbers else found[0]


def trial(family: Family, folder: Path, *, quick: bool = False) -> dict[str, Cell]:
    """The row of a family; `quick`: without what takes longest, graphs for other engines and compilers."""
    try:
        tried = Trial(family, folder)
    except Exception as cause:
        return {"reach": ["no", f"not made: {short(cause)}"]}
    return tried.row(quick)


def kept(row: dict[str, Cell], quick: bool) -> dict[str, Cell]:
    """What a quick trial leaves as it was."""
    return {key: row[key] for key in SLOW if quick and key in row}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    path = args.json or RESULTS
    before = json.loads(path.read_text())["rows"] if path.is_file() else {}
    rows = {}
    for name, family in families().items():
        if args.only is not None and name not in args.only:
            rows |= {name: before[name]} if name in before else {}
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = {**kept(before.get(name, {}), args.quick), **trial(family, Path(folder), quick=args.quick)}
        print(f"{time.perf_counter() - start:5.1f} s {name}: {rows[name]}", file=sys.stderr, flush=True)
        write_json(path, {"rows": before | rows})
    write_json(path, {"rows": rows})
    if path == RESULTS:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--only", nargs="*", metavar="NAME", help="try these again, and keep the other rows")
    args.add_argument("--quick", action="store_true", help="ask nothing new of ONNX and torch.compile")
    main(args.parse_args())
