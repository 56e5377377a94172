"""`vitlr bench`: how fast a model runs, measured in turns against the one it came from or another."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitlr.cli.options import (
    DATA,
    MACHINE,
    AsJson,
    Checkpoint,
    CheckpointKey,
    ClassMap,
    Data,
    Device,
    FileOrModel,
    ImgSize,
    Limit,
    ModelKwargs,
    NumClasses,
    Precision,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result, table, wrapped
from vitlr.engines.names import parse_engines
from vitlr.errors import InputError
from vitlr.runtime.words import four


def bench(
    model: FileOrModel,
    vs: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare with this model. [default: the one it came from]", rich_help_panel=DATA
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    data: Data = None,
    class_map: ClassMap = None,
    limit: Limit = None,
    as_json: AsJson = False,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Time it in these, in turns: torch, compile, onnxruntime, openvino, vitlr, or all. With --data "
            "its accuracy in each, too.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option("--batch-size", "-b", metavar="N,N", help="One or more, in turn.", rich_help_panel=MACHINE),
    ] = "1,64",
    precision: Precision = "float32",
    device: Device = None,
    torchcompile: Annotated[
        bool, typer.Option("--torchcompile", help="Compile the models first.", rich_help_panel=MACHINE)
    ] = False,
    kernels: Annotated[
        bool | None,
        typer.Option(
            "--kernels/--no-kernels",
            help="Time it on plain torch and fused (vitlr.fuse), too. [default: if it has low-rank layers]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Measurements of each; the fastest counts.", rich_help_panel=MACHINE),
    ] = 10,
    workers: Workers = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
) -> Result:
    """Measure throughput, and the speed-up over the original model in one interleaved run.

    What the kernels bring is shown too: the model on plain torch against the fused one.
    """
    sizes = _sizes(batch_size)
    if torchcompile and kernels:
        raise InputError("--kernels switches kernels off and on between calls, a compiled graph keeps them; drop one")
    alone = {"--vs": vs, "--torchcompile": torchcompile or None, "--kernels": kernels}
    for flag, given in alone.items() if engines is not None else ():
        if given is not None:
            raise InputError(f"--engines names all that the model runs in, and {flag} is none of them; leave one out")
    judged = {"--data": data, "--class-map": class_map, "--limit": limit, "--workers": workers}
    for flag, value in judged.items():
        if value is not None and (engines is None or data is None):
            raise InputError(f"{flag} is for accuracy in --engines, which takes --data; vitlr validate tells it alone")
    names = None if engines is None else parse_engines(engines)
    args = model_arguments(img_size, num_classes, model_kwargs)
    import torch

    from vitlr.checkpoint.structure import structure
    from vitlr.cli.models import Source, names_a_file, open_model, parse_device, parse_precision
    from vitlr.cli.timed import throughputs
    from vitlr.data.loader import open_data
    from vitlr.data.preprocessing import input_size
    from vitlr.engines.runners import PlainTorch
    from vitlr.measuring import cost
    from vitlr.ops.backends import native
    from vitlr.surgery import fusion

    where, dtype = parse_device(device), parse_precision(precision)
    source = Source(checkpoint, args, key=checkpoint_key)
    if names is not None:
        from vitlr.cli.commands.bench_engines import by_engine

        if device is not None and where.type != "cpu":
            raise InputError(f"--engines are timed on the CPU, not on {device}; leave --device out")
        network = open_model(model, source, device=torch.device("cpu"), weights=data is not None)
        read: dict[str, Any] = {"class_map": class_map, "workers": workers, "limit": limit}
        loader = None if data is None else open_data(data, network, need_labels=True, **read)
        return by_engine(model, network, names, sizes, precision=precision, repeats=repeats, loader=loader)
    only_vs = names_a_file(model) and vs is not None and not names_a_file(vs)
    networks = {"model": open_model(model, Source() if only_vs else source, device=where, weights=False).to(dtype)}
    if vs is not None:
        networks["vs"] = open_model(vs, Source() if names_a_file(vs) else source, device=where, weights=False).to(dtype)
    elif structure(networks["model"]):
        networks["vs"], vs = _original(networks["model"])
        networks["vs"] = networks["vs"].to(where, dtype)
    shapes = {name: input_size(network) for name, network in networks.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{model} takes images {shapes['model']}, {vs} takes {shapes['vs']}; they cannot be compared")
    costs = {name: cost.measure(network, shapes[name]) for name, network in networks.items()}
    runners: Any = {n: torch.compile(net, dynamic=False) for n, net in networks.items()} if torchcompile else networks
    if kernels or (kernels is None and not torchcompile and structure(networks["model"])):
        runners = {**runners, "plain": PlainTorch(networks["model"]), "fused": fusion.fuse(networks["model"])}
    times = throughputs(runners, sizes, shapes["model"], repeats, "--torchcompile")
    rows = [{"batch_size": size, **_flat(found)} for size, found in zip(sizes, times, strict=True)]
    values: dict[str, Any] = {
        "model": model,
        "vs": vs,
        "device": _describe(where),
        "precision": precision,
        "torchcompile": torchcompile,
        "threads": torch.get_num_threads(),
        "isa": native.build_info()["isa_used"],
    }
    for name, c in costs.items():
        ending = "" if name == "model" else f"_{name}"
        values |= {f"params{ending}": c.params, f"macs{ending}": c.macs, f"bytes{ending}": c.bytes}
    values["results"] = rows
    return Result(values, _text(values))


def _original(model: Any) -> tuple[Any, str]:
    """The dense model that a compressed one came from, with random weights, and its name.

    Where no origin is known: what the factors multiply to, which is as narrow as the model, and is called so.
    """
    from vitlr.checkpoint.creation import origin, remade
    from vitlr.surgery import fusion

    found, dense = origin(model), remade(model)
    if found is None or dense is None:
        return fusion.to_dense(model), "itself multiplied out"
    return dense, found["name"]


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--batch-size {text!r} cannot be read, expected one or more whole numbers such as 1,64")
    return [int(part) for part in parts]


def _flat(times: dict[str, dict[str, float]]) -> dict[str, float]:
    row = dict(times["model"])
    for name in times.keys() - {"model"}:
        row |= {f"{key}_{name}": value for key, value in times[name].items()}
    if "vs" in times:
        row["speedup"] = times["vs"]["batch_ms"] / times["model"]["batch_ms"]
    if "fused" in times:
        row["kernel_speedup"] = times["plain"]["batch_ms"] / times["fused"]["batch_ms"]
    return row


def _describe(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _text(values: dict[str, Any]) -> str:
    compared = values["vs"] is not None
    head = f"{values['model']} on {values['device']}, {values['precision']}, {values['threads']} threads"
    lines = [wrapped(head + (", compiled" if values["torchcompile"] else ""))]
    for key, unit, scale in (("params", "M", 1e6), ("macs", "G", 1e9), ("bytes", "MB", 1e6)):
        line = f"  {key:<6} {values[key] / scale:9.3f} {unit}"
        if compared:
            other = values[f"{key}_vs"]
            line += f", {values[key] / max(other, 1):.1%} of {values['vs']}'s {other / scale:.3f} {unit}"
        lines.append(line)
    if compared:
        lines.append(f"  vs     {values['vs']}")
    header = ["batch", "images/s", "ms"] + ["vs images/s", "vs ms", "speed"] * compared
    kernels = "kernel_speedup" in values["results"][0]
    header += ["plain ms", "fused ms", "kernels"] * kernels
    if kernels:
        lines.append(f"  kernels for {values['isa'] or 'no CPU: not built'}: fused ms against plain torch's")
    rows = []
    for row in values["results"]:
        cells = [str(row["batch_size"]), four(row["images_per_second"], 1), four(row["batch_ms"])]
        if compared:
            cells += [four(row["images_per_second_vs"], 1), four(row["batch_ms_vs"]), f"{four(row['speedup'])}x"]
        if kernels:
            cells += [four(row["batch_ms_plain"]), four(row["batch_ms_fused"]), f"{four(row['kernel_speedup'])}x"]
        rows.append(cells)
    return "\n".join([*lines, table(header, rows)])
