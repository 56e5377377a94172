"""The command line: `vitlr inspect | frontier | compress | prune | finetune | validate | report | export | bench |
doctor | demo`.

Exit status: 0 done, 1 a run that failed, 2 bad usage or bad input, 130 interrupted. The result goes to stdout, all else
to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli import interrupts
from vitlr.cli.command import Command
from vitlr.cli.commands.bench import bench
from vitlr.cli.commands.compress import compress
from vitlr.cli.commands.export import export
from vitlr.cli.commands.finetune import finetune
from vitlr.cli.commands.frontier import frontier
from vitlr.cli.commands.inspect import inspect
from vitlr.cli.commands.prune import prune
from vitlr.cli.commands.report import report
from vitlr.cli.commands.validate import validate
from vitlr.cli.options import OUTPUT, AsJson
from vitlr.cli.result import Result, guarded, wrapped
from vitlr.errors import InputError
from vitlr.runtime.launch import launched_first, silence
from vitlr.runtime.waiting import wait_briefly

app = typer.Typer(
    name="vitlr",
    help="Compress trained Vision Transformers without labels: ranks, widths and bits.\n\n"
    "Start with `vitlr demo`, then `vitlr frontier MODEL --data IMAGES`: what every size would cost. "
    "`vitlr COMMAND --help` has an example of each.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="A table for every operation: which kernel runs, and why.")
    ] = False,
    as_json: AsJson = False,
) -> Result:
    """Say what is installed, what was built, what runs, and why not."""
    from vitlr.cli.commands.doctor import diagnose, render

    found = diagnose()
    text = render(found, kernels)
    return Result(found, text if kernels else wrapped(text, 13))


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Train less.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Keep the files there.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: AsJson = False,
) -> Result:
    """Train a small ViT on digits, compress it, and show what that changed; no download, a few minutes."""
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, expected a folder")
    from vitlr.cli.commands.demo import run

    return Result(run(quick=quick, out=out, json=as_json), "")


def _version(asked: bool) -> None:
    if asked:
        import vitlr

        typer.echo(f"vitlr {vitlr.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which.")] = False,
) -> None:
    pass


# What `vitlr --help` says of each, in one line of 80 columns.
_SHORT = {
    "inspect": "What of a model can be compressed, and what it holds.",
    "frontier": "Try many budgets from one calibration, and say which to take.",
    "compress": "Compress a model to a budget, from unlabelled images.",
    "prune": "Learn which channels can go, with labels, and fine-tune.",
    "finetune": "Train a model, compressed or not, on labelled images.",
    "validate": "Accuracy, and agreement with another model.",
    "report": "One HTML page: budget, accuracy, speed, and where it errs.",
    "export": "Write a model for ONNX Runtime or OpenVINO.",
    "bench": "How fast a model is, in turns with the one it came from.",
    "doctor": "What is installed, was built, and runs here, and why not.",
    "demo": "Train a small ViT on digits and compress it; a few minutes.",
}
_EXAMPLES = {
    "inspect": "vitlr inspect vit_tiny_patch16_224",
    "frontier": "vitlr frontier vit_tiny_patch16_224 --data train --val val --out frontier",
    "compress": "vitlr compress vit_tiny_patch16_224 --data train --limit 1000 \\\n"
    "    --budget params:80% --out small.safetensors",
    "prune": "vitlr prune vit_tiny_patch16_224 --data train --rate 0.3 \\\n    --out pruned.safetensors",
    "finetune": "vitlr finetune small.safetensors --data train --val-data val --epochs 10 \\\n"
    "    --reference vit_tiny_patch16_224 --out tuned.safetensors",
    "validate": "vitlr validate small.safetensors --data val --class-map synsets.txt \\\n"
    "    --reference vit_tiny_patch16_224",
    "report": "vitlr report small.safetensors --data val --class-map synsets.txt \\\n"
    "    --reference vit_tiny_patch16_224 --out page",
    "export": "vitlr export small.safetensors --out small.onnx",
    "bench": "vitlr bench small.safetensors --batch-size 1,64",
}

_TOGETHER = (compress, finetune)  # what several processes of a launcher share; all else is process 0's
_LINGER = 3.0  # seconds

for _command in (inspect, frontier, compress, prune, finetune, validate, report, export, bench, doctor, demo):
    _name = _command.__name__
    _run = guarded(_command, together=_command in _TOGETHER)
    app.command(_name, cls=Command, epilog=_EXAMPLES.get(_name), short_help=_SHORT[_name])(_run)


def main() -> Any:
    """Run the command line; SIGTERM ends it as an interrupt does, with no partial file.

    Of several processes of a launcher only the first one says anything, but for faults in this program.
    """
    wait_briefly()
    interrupts.arm()
    if not launched_first():
        silence()
    try:
        with interrupts.outlasting():
            return app()
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        sys.exit(130)
    except SystemExit as leaving:
        if leaving.code and not launched_first():
            time.sleep(_LINGER)  # the launcher ends all when one does, and process 0 may be about to say the same
        raise
    except Exception:
        if launched_first():
            raise
        traceback.print_exc(file=sys.__stderr__)
        sys.exit(1)
    finally:
        interrupts.disarm()


if __name__ == "__main__":
    main()
