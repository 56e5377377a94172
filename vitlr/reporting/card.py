"""The model card: what a model is, what it came from, what it costs and how right it is, for whoever finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitlr.checkpoint import folders
from vitlr.checkpoint.contents import DATA
from vitlr.data.preprocessing import input_size
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.planning.plans import Plan

_TIMM = "timm/"  # the owner of the repositories that timm's own table names


@dataclass
class Card:
    """One model, its plan and figures; `str` is the card in Markdown, with the head that the Hub reads."""

    name: str
    base: str | None
    license: str | None
    architecture: str | None
    dense: bool  # whether timm opens it too
    plan: Plan | None
    params: int
    macs: int | None
    size: int
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    figures: dict[str, str] = field(default_factory=dict)  # a line of words by the name of a picture

    @classmethod
    def of(cls, model: nn.Module, header: Mapping[str, Any], config: Mapping[str, Any], size: int, name: str) -> Card:
        """Of a model, the header of its file, timm's config, and the bytes of the file."""
        try:
            plan = None if header.get("plan") is None else Plan.from_dict(header["plan"])
        except InputError:  # of learnt pruning, or of somebody's own
            plan = None
        found, base = header["origin"], header.get("base")
        of_timm = found is not None and found["library"] == "timm"
        try:
            macs = cost.measure(model, input_size(model)).macs
        except InputError:  # nothing says how large images are
            macs = None
        data = {key: config.get("pretrained_cfg", header["data"]).get(key) for key in DATA}
        return cls(
            name,
            base,
            licence_of(base),
            None if found is None else f"`{found['name']}` ({found['library']})",
            of_timm and not (header["structure"] or header["fused"] or header["tied"]),
            plan,
            cost.count_params(model),
            macs,
            size,
            {key: value for key, value in data.items() if value is not None},
            header["metrics"] if isinstance(header.get("metrics"), Mapping) else {},
        )

    def __str__(self) -> str:
        parts = [self._head(), f"# {self.name.rpartition('/')[2]}", self._what(), self._table(), self._use()]
        parts += [f"![{picture}]({picture})\n\n{line}" for picture, line in self.figures.items()]
        parts.append(
            f"Licence: {self.license}." if self.license else "Licence: not stated; see that of the base model."
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        tags = ["vitlr", "model compression"] if self.plan is not None else ["vitlr"]
        lines = ["---", "tags:", *(f"- {tag}" for tag in tags), f"library_name: {'timm' if self.dense else 'vitlr'}"]
        lines += [f"license: {self.license}"] if self.license else []
        lines += [f"base_model: {self.base}"] if self.base else []
        return "\n".join([*lines, "---"])

    def _what(self) -> str:
        of = f" of `{self.base}`" if self.base else ""
        what = f"Architecture: {self.architecture}." if self.architecture else "Of an architecture of its own."
        if self.plan is None:
            return f"A model{of}, written by vitlr. {what}"
        return f"A compressed model{of}, made by vitlr under `{self.plan.budget}` (method {self.plan.method}). {what}"

    def _table(self) -> str:
        plan = self.plan
        rows = [
            ("parameters", f"{self.params:,}", f"{plan.params:,}" if plan else ""),
            ("MACs of one image, million", _millions(self.macs), _millions(plan.macs if plan else None)),
            ("MB of weights", _millions(self.size), _millions(plan.bytes if plan else None)),
        ]
        rows += [(words, _number(self.metrics, key), "") for key, words in _METRICS.items() if key in self.metrics]
        head = [("", "here", "dense"), ("---", "---", "---")]
        return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *(row for row in rows if row[1])])

    def _use(self) -> str:
        called = f"{folders.HUB}{self.name}" if "/" in self.name else f"{folders.LOCAL}{self.name}"
        lines = ["```python", "import vitlr", "", f'model = vitlr.load("{called}")']
        if self.architecture is None:
            lines[-1] = f'model = vitlr.load("{called}", model=dense)  # a dense one of the same architecture'
        lines += [f'# or timm.create_model("{called}", pretrained=True)'] if self.dense else []
        how = ", ".join(f"{key} {value}" for key, value in self.data.items())
        return "\n".join([*lines, "```"]) + (f"\n\nImages: {how}." if how else "")


_METRICS = {
    "top1": "top-1, % (95 %)",
    "top5": "top-5, %",
    "agreement": "same first class as dense, %",
    "kl": "KL to dense, nats",
    "cosine": "cosine to dense",
    "images": "images measured on",
}


def _millions(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f}"


def _number(metrics: Mapping[str, Any], key: str) -> str:
    value = metrics[key]
    if not isinstance(value, (int, float)):
        return ""
    if key == "top1" and isinstance(metrics.get("top1_low"), float) and isinstance(metrics.get("top1_high"), float):
        return f"{value:.2f} ({metrics['top1_low']:.1f} to {metrics['top1_high']:.1f})"
    return str(value) if isinstance(value, int) else format(value, ".4f" if key in ("kl", "cosine") else ".2f")


def licence_of(base: str | None) -> str | None:
    """The licence that timm's table has for a repository of timm's."""
    if base is None or not base.startswith(_TIMM):
        return None
    import timm

    try:
        found = timm.get_pretrained_cfg(base.removeprefix(_TIMM))
    except RuntimeError:  # a tag that this version of timm does not know
        return None
    license = getattr(found, "license", None)
    return license if isinstance(license, str) else None
