"""The command line for tests: a tiny model's flags, and what a run answered."""

from __future__ import annotations

import json
from pathlib import Path

NAME = "vit_tiny_patch16_224"
TINY = ["--img-size", "32", "--num-classes", "5"]
TINY += ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
KEYS = ["out", "params", "params_kept", "macs", "macs_kept", "bytes", "rungs", "seconds", "images"]


class Answer:
    def __init__(self, result):
        self.status, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    @property
    def json(self):
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def nothing_left(folder: Path, *names: str) -> bool:
    return not any((folder / name).exists() for name in names) and not list(folder.glob(".*.part"))
