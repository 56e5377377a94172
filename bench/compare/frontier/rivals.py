"""What a user could do instead, with the settings that each tool's own documents advise, stored as its user would.

    pip install nncf openvino torchao hqq

What a tool leaves alone is stored in float16, as OpenVINO does by itself. A classifier's head gets 8 bits wherever the
tool lets us say so, as NNCF does by itself. Everything computes in float32, from the file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.compare.frontier.subjects import Forward, Subject
from vitlr.anatomy.linears import classifier_names
from vitlr.engines.openvino_core import openvino_core

Made = tuple[Forward, int, dict[str, Any]]  # what answers, bytes of its file, what else there is to say
Make = Callable[[Subject, Path], Made]
GROUP = 64  # weights of a row that share a step; NNCF's 128 and torchao's 128 do not divide a width of 192
SUBSET = 300  # calibration images of NNCF: its default for W8A8, and more than its default of 128 for weights


def nncf_int8(subject: Subject, folder: Path) -> Made:
    """Weights and activations in 8 bits, static: NNCF's post-training quantisation for transformers."""
    import nncf

    choices = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": SUBSET}
    return openvino(nncf.quantize(converted(subject), data(subject), **choices), folder)


def nncf_weights(mode: str, *, grouped: bool = True, **calibrated: bool) -> Make:
    """Weights alone; what is `calibrated` (`awq`, `scale_estimation`, `gptq`) sees images."""

    def make(subject: Subject, folder: Path) -> Made:
        import nncf

        choices: dict[str, Any] = {"group_size": GROUP, "ratio": 1.0} if grouped else {}
        if calibrated:
            choices |= {**calibrated, "dataset": data(subject), "subset_size": SUBSET}
        return openvino(
            nncf.compress_weights(converted(subject), mode=nncf.CompressWeightsMode(mode), **choices), folder
        )

    return make


def converted(subject: Subject) -> Any:
    """The dense model for OpenVINO, with any number of images."""
    import openvino as ov

    example = next(iter(subject.images))[0][:2]
    return ov.convert_model(copy.deepcopy(subject.model), example_input=example, input=[-1, *example.shape[1:]])


def data(subject: Subject) -> Any:
    """The calibration images one by one, as NNCF wants them."""
    import nncf

    return nncf.Dataset([image[None].numpy() for batch, _ in subject.images for image in batch])


def openvino(model: Any, folder: Path) -> Made:
    """Saved, read back and compiled; its size is that of the .bin, which holds all the numbers."""
    import openvino as ov

    path = folder / "model.xml"
    ov.save_model(model, path)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = openvino_core().compile_model(path, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0]), path.with_suffix(".bin").stat().st_size, {}


def torchao(bits: int) -> Make:
    """Weights alone: 8 bits a row, or 4 bits in groups; the file holds 4-bit codes two to a byte."""

    def make(subject: Subject, folder: Path) -> Made:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType

        small, heads = halved(subject.model), classifier_names(subject.model)
        coarse = {name for name, m in small.named_modules() if isinstance(m, nn.Linear) and bits == 4} - set(heads)
        four = {"granularity": PerGroup(GROUP), "mapping_type": MappingType.ASYMMETRIC}
        quantize_(
            small,
            IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
            filter_fn=lambda m, name: isinstance(m, nn.Linear) and name not in coarse,
        )
        if coarse:
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4, **four)
            quantize_(small, config, filter_fn=lambda _, name: name in coarse)
        state = {part: t for name, value in small.state_dict().items() for part, t in flat(name, value)}
        for name in coarse:
            for part in (f"{name}.weight.qdata", f"{name}.weight.zero_point"):
                state[part] = pairs(state[part])
        return small, saved(state, folder), {}

    return make


def pairs(codes: Tensor) -> Tensor:
    """Two codes of four bits in every byte."""
    low, high = (codes.flatten().to(torch.uint8) & 15).unflatten(0, (-1, 2)).unbind(1)
    return low | high << 4


def hqq(bits: int, axis: int = 1) -> Make:
    """Half-quadratic quantisation of every linear in groups; no images needed."""

    def make(subject: Subject, folder: Path) -> Made:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        small, heads = halved(subject.model), classifier_names(subject.model)
        for name in [name for name, m in small.named_modules() if isinstance(m, nn.Linear)]:
            config = BaseQuantizeConfig(nbits=8 if name in heads else bits, group_size=GROUP, axis=axis)
            linear = small.get_submodule(name)
            how = {"compute_dtype": torch.float32, "device": "cpu"}
            small.set_submodule(name, HQQLinear(linear, config, **how))  # type: ignore[arg-type]
        for module in small.modules():
            if isinstance(module, HQQLinear):
                module.meta = {k: v.half().float() if is_float(v) else v for k, v in module.meta.items()}
        return small, saved(small.state_dict(), folder), {}

    return make


def halved(model: nn.Module) -> nn.Module:
    """A copy whose numbers are those that float16 holds, in float32."""
    small = copy.deepcopy(model)
    for value in (*small.parameters(), *small.buffers()):
        value.requires_grad_(False).copy_(value.half())
    return small


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def saved(state: Mapping[str, Any], folder: Path) -> int:
    """Bytes of a safetensors file of a state: codes as they are, all other numbers in float16."""
    parts = {part: tensor for name, value in state.items() for part, tensor in flat(name, value)}
    path = folder / "model.safetensors"
    save_file({name: (t.half() if is_float(t) else t).contiguous().clone() for name, t in parts.items()}, path)
    return path.stat().st_size


def flat(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of."""
    if hasattr(value, "__tensor_flatten__"):
        return [pair for part in value.__tensor_flatten__()[0] for pair in flat(f"{name}.{part}", getattr(value, part))]
    return [(name, value)] if isinstance(value, Tensor) else []


AWQ = {"awq": True, "scale_estimation": True}
RIVALS: dict[str, Make] = {
    "NNCF W8A8": nncf_int8,
    "NNCF int8 weights": nncf_weights("int8_asym", grouped=False),
    **{f"NNCF int{bits}": nncf_weights(mode) for bits, mode in ((4, "int4_asym"), (3, "int3_sym"), (2, "int2_sym"))},
    **{
        f"NNCF int{bits}, AWQ + scale estimation": nncf_weights(mode, **AWQ)
        for bits, mode in ((4, "int4_asym"), (3, "int3_sym"))
    },
    "NNCF int4, GPTQ": nncf_weights("int4_asym", gptq=True),
    "torchao int8": torchao(8),
    "torchao int4": torchao(4),
    **{f"HQQ, {bits} bits": hqq(bits) for bits in (8, 4, 3, 2)},
}
