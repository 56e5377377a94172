"""Files in the engines that run them, as modules: images in, logits out."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.engines.installed import need
from vitlr.engines.openvino_core import openvino_core
from vitlr.errors import InputError, RunError
from vitlr.runtime.words import one_line

_BYTES = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm"}  # in ONNX Runtime's optimised graph
_PRODUCTS = {"FullyConnected", "MatMul"}  # in OpenVINO's, of bytes where it runs in u8 or i8
_LARGE = 1e9  # bytes of a file whose optimised graph is not looked at: it would be written once more


class Engine(nn.Module):
    """A file in an engine: x [B, C, H, W] float32 -> logits float32, on the CPU.

    `int8`: how many products of bytes the engine makes of it, None where it was not looked for. Raises `InputError`
    where the engine is not installed, `RunError` for what it cannot open or run.
    """

    int8: int | None = None

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, precision: str = "float32") -> None:
        super().__init__()
        self.threads = torch.get_num_threads() if threads is None else threads
        try:
            self.open(Path(path), precision)
        except InputError:
            raise
        except Exception as cause:  # engines raise what they like
            raise RunError(f"{self} cannot open {path}: {one_line(cause, 300)}") from cause

    def open(self, path: Path, precision: str) -> None:
        """Read the file and get it ready."""
        raise NotImplementedError

    def answer(self, x: Any) -> Any:
        """Logits of images, both numpy arrays."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        try:
            return torch.from_numpy(self.answer(x.detach().contiguous().numpy()))
        except Exception as cause:
            raise RunError(f"{self} cannot run images {list(x.shape)}: {one_line(cause, 300)}") from cause

    def __str__(self) -> str:
        return type(self).__name__.lower()


class OnnxRuntime(Engine):
    """ONNX Runtime's CPU provider; in float32 and in bytes only."""

    def open(self, path: Path, precision: str) -> None:
        onnxruntime = need("onnxruntime", "running an ONNX file")
        if precision != "float32":
            raise InputError(f"ONNX Runtime computes in float32 and int8 on a CPU, not in {precision}; leave it out")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads steal the next one's time
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # no rounding unasked for
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "own.onnx"
            looked = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) < _LARGE
            if looked:
                options.optimized_model_filepath = str(own)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            if looked:
                nodes = need("onnx", "running an ONNX file").load(str(own), load_external_data=False).graph.node
                self.int8 = sum(node.op_type in _BYTES for node in nodes)
        self.input = self.session.get_inputs()[0].name

    def answer(self, x: Any) -> Any:
        return self.session.run(None, {self.input: x})[0]


class OpenVino(Engine):
    """OpenVINO's CPU plugin, one stream, computing what is not in bytes in `precision`."""

    def open(self, path: Path, precision: str) -> None:
        hints = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        settings = {
            "INFERENCE_PRECISION_HINT": hints[precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # no rounding unasked for
        }
        compiled = openvino_core().compile_model(path, "CPU", settings)
        self.request = compiled.create_infer_request()
        infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
        kinds = Counter(
            (str(_value(info["layerType"])), str(_value(info["runtimePrecision"])))
            for info in infos
            if "layerType" in info and "runtimePrecision" in info
        )
        self.int8 = sum(n for (kind, dtype), n in kinds.items() if kind in _PRODUCTS and dtype in ("u8", "i8"))

    def answer(self, x: Any) -> Any:
        return self.request.infer([x], share_inputs=True)[0].copy()


def _value(info: Any) -> Any:
    return getattr(info, "value", info)


ENGINES: dict[str, type[Engine]] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}
