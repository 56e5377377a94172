"""Parameters that several commands share, under timm's names where timm has one. Importing this costs no torch."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli.command import KWARGS, PAIR
from vitlr.errors import InputError

DATA, OUTPUT, MODEL, MACHINE = "Data", "Output", "Model", "Machine"  # sections of the help
_OWN_FLAGS = {
    "name": "MODEL",
    "checkpoint": "--checkpoint",
    "checkpoint_path": "--checkpoint",
    "checkpoint_key": "--checkpoint-key",
    "pretrained": "MODEL",
}
_ELSEWHERE = "; hf-hub:OWNER/NAME and local-dir:FOLDER name either, elsewhere."

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=f"A timm model name, or a file that vitlr wrote{_ELSEWHERE}",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
FileOrModel = Annotated[
    str,
    typer.Argument(
        metavar="F_OR_MODEL",
        help=f"A file that vitlr wrote, or a timm model name{_ELSEWHERE}",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="F",
        help="Weights of the timm model: safetensors or a torch state dict. [default: timm's own]",
        rich_help_panel=DATA,
    ),
]
CheckpointKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Which state dict of it is read, such as teacher. [default: the one that fits]",
        rich_help_panel=DATA,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="TAR_OR_DIR", help="A folder of images, a .tar or hfds/NAME.", rich_help_panel=DATA),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(
        metavar="F", help="Text file: one folder name a line, in the model's class order.", rich_help_panel=DATA
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Use only N images, spread over all classes.", rich_help_panel=DATA),
]
ValData = Annotated[
    str | None,
    typer.Option(metavar="TAR_OR_DIR", help="Held-out images that choose the best epoch.", rich_help_panel=DATA),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="F", help="The file to write; an earlier result is replaced.", rich_help_panel=OUTPUT
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep snapshots there, and go on from them.", rich_help_panel=OUTPUT),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on one line on stdout, nothing else there.", rich_help_panel=OUTPUT),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in one batch.", rich_help_panel=MACHINE),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "-j", metavar="N", min=0, help="Processes that decode images, 0 for none.", rich_help_panel=MACHINE
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda or cuda:N. [default: cuda if there is one]", rich_help_panel=MACHINE),
]
Precision = Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)]
ImgSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Image size of the timm model.", rich_help_panel=MODEL)
]
NumClasses = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Number of classes of the timm model.", rich_help_panel=MODEL)
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(
        KWARGS,
        metavar="KEY=VALUE...",
        help="More arguments of the timm model.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]


def model_arguments(img_size: int | None, num_classes: int | None, pairs: Sequence[str] | None) -> dict[str, Any]:
    """What `timm.create_model` is called with; `InputError` for a pair that cannot be read or said twice."""
    named = {"img_size": img_size, "num_classes": num_classes}
    args: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for pair in pairs or ():
        match = PAIR.fullmatch(pair)
        if match is None:
            raise InputError(f"{KWARGS} {pair!r} cannot be read; expected key=value, such as drop_rate=0.1")
        key, text = match.groups()
        if key in _OWN_FLAGS:
            raise InputError(f"{KWARGS} {key}= is no argument of the architecture; use {_OWN_FLAGS[key]}")
        if key in args:
            raise InputError(f"the model argument {key} is given twice")
        try:
            args[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            args[key] = text  # a word, such as global_pool=avg
    return args
