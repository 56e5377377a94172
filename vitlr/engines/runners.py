"""One model as each engine runs it: plain torch, that compiled, our kernels, and others' on an exported file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.engines.export import export
from vitlr.engines.names import OTHERS
from vitlr.engines.running import ENGINES
from vitlr.ops.dispatch.registry import backend
from vitlr.surgery import fusion


class PlainTorch(nn.Module):
    """Runs a model with every kernel of vitlr off, as `VITLR_BACKEND=torch` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        with backend("torch"):
            return self.model(*args)


def runners(model: nn.Module, engines: Sequence[str], folder: Path, precision: str = "float32") -> dict[str, nn.Module]:
    """What answers in each engine, copies of the model in `precision`; exported files lie in `folder`.

    Raises `RunError` where the model cannot be exported, and `InputError` for a precision that an engine has not.
    """
    plain = fusion.unfuse(model)
    path = folder / ("model.onnx" if "onnxruntime" in engines else "model.xml")
    if any(name in OTHERS for name in engines):
        export(plain, path)
    cast = plain.to(getattr(torch, precision))
    found: dict[str, nn.Module] = {}
    for name in engines:
        if name in OTHERS:
            found[name] = ENGINES[name](path, precision=precision)
        elif name == "vitlr":
            found[name] = fusion.fuse(cast)
        else:
            compiled: Any = torch.compile(cast, dynamic=False) if name == "compile" else cast
            found[name] = PlainTorch(compiled)
    return found
