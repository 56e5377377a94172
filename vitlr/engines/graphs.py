"""A model as an ONNX graph, by torch's own exporter."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitlr.data.batches import first_tensor
from vitlr.engines.installed import need
from vitlr.engines.norms import fold_norms
from vitlr.errors import RunError

INPUT, OUTPUT = "images", "logits"
_ONE_SIZE = "static shape|specializ|[Cc]onstraint|conflicts between|sym_stride"  # what the exporter says of those
_LOUD = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


class Answer(nn.Module):
    """A model that gives its logits, or the first tensor of its answer, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return first_tensor(self.model(images))


def graph_of(
    model: nn.Module, images: Tensor, *, batch: bool, size: bool, notes: Mapping[str, str], opset: int | None = None
) -> Any:
    """The graph (`onnx_ir.Model`) of a model in float32, its layers of integers said in ONNX's words.

    `images` [B, C, H, W] are an example; `batch`: of any number of them, `size`: of any height and width. `notes` are
    kept with the graph, `opset` is ONNX's version where a certain one is needed. Raises `RunError` with the operation
    and the module that cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        need(package, "export")
    dims: dict[int, Any] = {0: torch.export.Dim("batch")} if batch else {}
    if size:
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    answering = Answer(model)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(answering, (images,), dynamic_shapes=(dims or None,))
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
            )
        except Exception as cause:  # whatever a forward or a translation raises
            raise RunError(_refusal(answering, cause, size)) from cause
    assert program is not None
    found = program.model
    fold_norms(found.graph)
    _tidy(found)
    found.metadata_props.update(notes)
    return found


def _tidy(model: Any) -> None:
    """Leave out what nobody reads: numbers that went elsewhere, and where in which file an operation was called."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for thing in (model, graph, *graph, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
        thing.metadata_props.clear()
        thing.doc_string = None


def _refusal(model: nn.Module, cause: Exception, size: bool) -> str:
    """One line: what could not be exported, where, and why."""
    operation, place = _where(model, cause)
    chain = list(_chain(cause))
    reason = next((_reason(link) for link in reversed(chain) if _reason(link)), type(cause).__name__)
    if size and re.search(
        "static shape|specializ|[Cc]onstraint|conflicts between|sym_stride", " ".join(map(str, chain))
    ):
        return (
            "the model takes images of one size only: export it without a dynamic size, or create it with "
            f"dynamic_img_size=True where timm has that ({reason:.200})"
        )
    what = f"{operation or 'its forward'} in {place or 'the model'}"
    return f"the model cannot be exported: {what}: {reason:.300}"


def _where(model: nn.Module, cause: BaseException) -> tuple[str, str]:
    """The operation that was being translated, and the module, by name, that called it or was being called."""
    names = {id(module): name.removeprefix("model.") for name, module in model.named_modules()}
    operation = place = ""
    for link in _chain(cause):
        step = link.__traceback__
        while step is not None:
            values = step.tb_frame.f_locals
            node, module = values.get("node"), values.get("self")
            if isinstance(node, fx.Node) and node.op == "call_function":
                operation = str(node.target)
                called = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                place = called[-1].removeprefix("model.") if called else place
            elif isinstance(module, nn.Module) and not operation and names.get(id(module)):
                place = names[id(module)]
            step = step.tb_next
    return operation, place


def _chain(cause: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _reason(cause: BaseException) -> str:
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells about itself on the way: an error says all that counts."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
