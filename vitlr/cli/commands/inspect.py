"""`vitlr inspect`: which linears of a model can be compressed, which stay dense, which nobody can reach."""

from __future__ import annotations

from typing import Any

from vitlr.cli.options import (
    AsJson,
    Checkpoint,
    CheckpointKey,
    FileOrModel,
    ImgSize,
    ModelKwargs,
    NumClasses,
    model_arguments,
)
from vitlr.cli.result import Result, table
from vitlr.runtime.words import gathered, numbered, tail

COLUMNS, NAME, SHORTEST = 80, 27, 16  # of a terminal; of a name: so much tells the stages of ConvNeXt apart
HEADER, NARROWED = ("W", "params", "share", "note"), "narrowed"
MANY = 24  # rows beyond which those that are alike are summed up
Cells = tuple[str, str, str, int, str]  # layer, what becomes of it, size, parameters, note
_BYPASSED = "read past by the model; made visible exactly"


def inspect(
    model: FileOrModel,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> Result:
    """Show which linears are compressible, which are bypassed, and what share of the parameters they hold."""
    import torch

    from vitlr.anatomy import linears, visibility
    from vitlr.anatomy.attention import fewer_heads
    from vitlr.anatomy.mlps import narrower_mlps
    from vitlr.checkpoint import origins
    from vitlr.checkpoint.structure import structure
    from vitlr.cli.models import Source, open_model
    from vitlr.measuring import cost

    source = Source(checkpoint, model_arguments(img_size, num_classes, model_kwargs), key=checkpoint_key)
    with origins.unfilled():  # nothing here looks at a value
        network = open_model(model, source, device=torch.device("cpu"), weights=False)
    bypassed = visibility.make_visible(network)
    survey = linears.survey(network)
    total = cost.count_params(network)
    targets = [
        _row(name, m.out_features, m.in_features, m.weight.numel(), _BYPASSED if name in bypassed else "")
        for name, m in survey.targets.items()
    ]
    low_rank = [
        {
            **_row(name, s["out_features"], s["in_features"], s["rank"] * (s["out_features"] + s["in_features"]), ""),
            "rank": s["rank"],
        }
        for name, s in structure(network).items()
        if "rank" in s
    ]
    rounded = [
        _row(name, s["out_features"], s["in_features"], s["out_features"] * s["in_features"], "codes of 8 bits or less")
        for name, s in structure(network).items()
        if "quantized" in s
    ]
    narrowed = [
        {"name": name, "width": now, "full_width": full} for name, (now, full) in narrower_mlps(network).items()
    ]
    heads = [{"name": name, "heads": now, "full_heads": full} for name, (now, full) in fewer_heads(network).items()]
    selected = [
        {"name": name, **{key: s[key] for key in ("inputs", "in_features", "outputs", "out_features")}}
        for name, s in structure(network).items()
        if "inputs" in s
    ]
    kept = []
    for name, reason in survey.kept.items():
        linear: Any = network.get_submodule(name)
        kept.append(_row(name, linear.out_features, linear.in_features, linear.weight.numel(), reason))
    hidden = [{"name": name, "params": h.parameters, "reason": h.reason} for name, h in survey.hidden.items()]
    share = sum(row["params"] for row in targets) / max(total, 1)
    values = {
        "model": model,
        "params": total,
        "share": share,
        "layers": len(targets),
        "targets": targets,
        "low_rank": low_rank,
        "rounded": rounded,
        "narrowed": narrowed,
        "heads": heads,
        "selected": selected,
        "kept": kept,
        "hidden": hidden,
    }
    order = [name for name, _ in network.named_modules()]
    return Result(values, _text({**values, "order": order}))


def _row(name: str, n: int, k: int, params: int, note: str) -> dict[str, Any]:
    return {"name": name, "out_features": n, "in_features": k, "params": params, "reason": note}


def _text(values: dict[str, Any]) -> str:
    total = max(values["params"], 1)
    headings = {"targets": "compressible", "low_rank": "low rank", "rounded": "rounded"}
    headings |= {"kept": "stays dense", "hidden": "out of reach"}
    found = [(row, heading) for key, heading in headings.items() for row in values[key]]
    order = {name: index for index, name in enumerate(values["order"])}
    rows = [_cells(row, heading) for row, heading in sorted(found, key=lambda pair: order.get(pair[0]["name"], 10**9))]
    widths = [(row["name"], f"{row['width']} of {row['full_width']}") for row in values["narrowed"]]
    rows += [(name, NARROWED, size, 0, "hidden width kept") for name, size in widths]
    rows += [
        (row["name"], NARROWED, f"{row['heads']} of {row['full_heads']}", 0, "heads kept") for row in values["heads"]
    ]
    rows += [(row["name"], NARROWED, _channels(row), 0, "channels kept") for row in values["selected"]]
    rows = _summed(rows) if len(rows) > MANY else rows
    lines = _lines(rows, total)
    counts = {key: sum(row["params"] for row in values[key]) for key in headings}
    rest = values["params"] - sum(counts.values())
    lines.append(f"{values['model']}: {values['params']:,} parameters; weights of linears:")
    for key, heading in headings.items():
        if values[key]:
            lines.append(f"  {heading:<13} {len(values[key]):>4}  {counts[key]:>14,}  {counts[key] / total:6.1%}")
    lines.append(f"  everything else     {rest:>14,}  {rest / total:6.1%}")
    if not values["targets"]:
        lines.append("nothing here can be compressed")
    return "\n".join(lines)


def _lines(rows: list[Cells], total: int) -> list[str]:
    """The table, as wide as a terminal; what is narrower follows, its words over the columns that it leaves empty."""
    whole = [row for row in rows if row[1] != NARROWED]
    figures = [(size, f"{n / 1e6:.3f}M", f"{n / total:.1%}", note) for _, _, size, n, note in whole]
    rest = sum(max(map(len, column)) + 2 for column in zip(HEADER, *figures, strict=True)) + 2 + len("compressible")
    name_width = max(min(NAME, COLUMNS - rest), SHORTEST)
    shown = [(tail(row[0], name_width), row[1], *cells) for row, cells in zip(whole, figures, strict=True)]
    narrow = [(tail(row[0], name_width), NARROWED, f"{row[2]} {row[4]}") for row in rows if row[1] == NARROWED]
    first = max((len(cells[0]) for cells in (*shown, *narrow)), default=0)
    lines = [table((f"{'layer':<{first}}", "", *HEADER), shown, left=2)] if shown else []
    return lines + [f"{name:<{first}}  {heading:<12}  {words}" for name, heading, words in narrow]


def _cells(row: dict[str, Any], heading: str) -> Cells:
    size = f"{row['out_features']}x{row['in_features']}" if "in_features" in row else ""
    note = f"rank {row['rank']}" if "rank" in row else row["reason"]
    return row["name"], heading, size, row["params"], "opened" if note == _BYPASSED else note


def _channels(row: dict[str, Any]) -> str:
    """What is left of the inputs and outputs of a layer that lost some."""
    n, k = (f"{row[f'{side}puts'] or row[f'{side}_features']}/{row[f'{side}_features']}" for side in ("out", "in"))
    return f"{n} x {k}"


def _summed(rows: list[Cells]) -> list[Cells]:
    """Rows that differ in one number of their names only as one, in the first one's place."""
    groups: dict[tuple[str, ...], list[Cells]] = {}
    for row in rows:
        name, heading, size, _, note = row
        groups.setdefault((numbered(name)[0], heading, size, note), []).append(row)
    found = []
    for (pattern, heading, size, note), some in groups.items():
        numbers = [number for row in some if (number := numbered(row[0])[1]) is not None]
        name = gathered(pattern, numbers) if len(numbers) == len(some) else some[0][0]
        found.append((name, heading, size, sum(row[3] for row in some), note))
    return found
