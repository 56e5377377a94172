"""Options that several commands share, under timm's names where timm has one. Importing this costs no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from vitlr.errors import InputError

_KWARGS = "--model-kwargs"
_PAIR = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OWN_FLAGS = {"name": "MODEL", "checkpoint": "--checkpoint", "checkpoint_path": "--checkpoint", "pretrained": "MODEL"}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A timm model name.", show_default=False)]
FileOrModel = Annotated[
    str, typer.Argument(metavar="F_OR_MODEL", help="A file that vitlr wrote, or a timm model name.", show_default=False)
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="F", help="Weights of the timm model: safetensors or a torch state dict. [default: timm's own]"
    ),
]
Data = Annotated[str | None, typer.Option(metavar="TAR_OR_DIR", help="A folder of images, a .tar or hfds/NAME.")]
ClassMap = Annotated[
    Path | None, typer.Option(metavar="F", help="Text file: one folder name a line, in the model's class order.")
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only N images, spread over all classes.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Images in one batch.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", metavar="N", min=0, help="Processes that decode images, 0 for none.")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N. [default: cuda if there is one]")
]
Precision = Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")]
ImgSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Image size of the timm model.")]
NumClasses = Annotated[int | None, typer.Option(metavar="N", min=0, help="Number of classes of the timm model.")]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(_KWARGS, metavar="KEY=VALUE...", help="More arguments of the timm model.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on one line on stdout, nothing else there.")]


class Command(TyperCommand):
    """A command that also takes timm's `--model-kwargs a=1 b=2`, several values after one flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _one_value_a_flag(args))


def _one_value_a_flag(args: Sequence[str]) -> list[str]:
    spread: list[str] = []
    pairs: int | None = None  # values seen after the flag; None where no flag is open
    for arg in args:
        if pairs is not None and _PAIR.fullmatch(arg):
            spread += [_KWARGS, arg]
            pairs += 1
            continue
        if pairs == 0:
            spread.append(_KWARGS)  # without a value: the parser says so
        pairs = 0 if arg == _KWARGS else None
        if pairs is None:
            spread.append(arg)
    return [*spread, _KWARGS] if pairs == 0 else spread


def model_arguments(img_size: int | None, num_classes: int | None, pairs: Sequence[str] | None) -> dict[str, Any]:
    """What `timm.create_model` is called with; `InputError` for a pair that cannot be read or said twice."""
    named = {"img_size": img_size, "num_classes": num_classes}
    args: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for pair in pairs or ():
        match = _PAIR.fullmatch(pair)
        if match is None:
            raise InputError(f"{_KWARGS} {pair!r} cannot be read; expected key=value, such as drop_rate=0.1")
        key, text = match.groups()
        if key in _OWN_FLAGS:
            raise InputError(f"{_KWARGS} {key}= is no argument of the architecture; use {_OWN_FLAGS[key]}")
        if key in args:
            raise InputError(f"the model argument {key} is given twice")
        try:
            args[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            args[key] = text  # a word, such as global_pool=avg
    return args
