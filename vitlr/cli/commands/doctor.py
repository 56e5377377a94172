"""What is installed, what was built, what runs on this machine, and why the rest does not (`vitlr doctor`)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from vitlr.errors import InputError
from vitlr.runtime.machine import cores, processor
from vitlr.runtime.words import one_line

_PACKAGES = ("vitlr", "torch", "torchvision", "triton", "timm", "safetensors", "numpy", "typer", "rich")
_OPTIONAL = ("scikit-learn", "datasets", "peft", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino")
_VARIABLES = ("VITLR_BACKEND", "VITLR_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_ROWS, _WIDTH, _HIDDEN, _BLOCKS, _RANK = 8 * 197, 768, 3072, 12, 192  # eight images through a block of ViT-B


def diagnose() -> dict[str, Any]:
    """Everything that `vitlr doctor` tells, as plain values; a part that fails says so in its place."""
    devices = _devices()
    return {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "triton": _triton(),
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(), "cores": cores()},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": devices,
        "native": _native(),
        "cuda": _cuda(),
        "ops": [_explained(op, device) for device in devices for op in _shapes(torch.device(device["name"]))],
    }


def render(found: dict[str, Any], kernels: bool = True) -> str:
    """The same for people, with a table for every operation, or in one line what runs them."""
    lines = [f"python       {found['python']}"]
    for name, version in found["packages"].items():
        lines.append(f"{name:<12} {version or 'not installed'}")
    missing = [name for name, version in found["optional"].items() if version is None]
    there = [f"{name} {version}" for name, version in found["optional"].items() if version is not None]
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    lines.append(f"optional     {', '.join(there) or 'none'}{absent}")
    triton = found["triton"]
    lines.append(f"triton runs  {'yes' if triton['runs'] else 'no: ' + triton['why_not']}")
    threads = found["threads"]
    lines.append(f"threads      {threads['torch']} of {threads['cores']} cores, {threads['interop']} interop")
    for name, value in found["environment"].items():
        lines.append(f"{name}={value}")
    for device in found["devices"]:
        lines.append(f"device       {device['name']}: {device['description']}")
    native = found["native"]
    if native["available"]:
        if native["isa_used"]:
            lines.append(f"isa          {native['isa_used']}: {native['isa_why']}")
        lines.append(
            f"native       built with {native['compiler']}, {', '.join(native['isa_compiled'])}; "
            f"uses {native['isa_used']}, {'with' if native['openmp'] else 'without'} OpenMP"
        )
    else:
        lines.append("native       not used, torch takes its place")
    if native["why_not"]:
        lines.append(f"             {native['why_not']}")
    cuda = found["cuda"]
    if cuda["built"]:
        lines.append(f"cuda         built with {cuda['compiler']} for {cuda['targets']}")
        lines.append(f"             {cuda['state']}")
    if cuda["why_not"]:
        lines.append(f"{'' if cuda['built'] else 'cuda':<12} {cuda['why_not']}")
    if not kernels:
        return "\n".join([*lines, *_chosen(found["ops"])])
    for op in found["ops"]:
        lines += ["", op["table"] if op["problem"] is None else f"{op['op']} on {op['device']}: {op['problem']}"]
    return "\n".join(lines)


def _chosen(ops: list[dict[str, Any]]) -> list[str]:
    """A line a device: how many operations run on what."""
    lines = []
    for device in dict.fromkeys(op["device"] for op in ops):
        chosen = [op["chosen"] for op in ops if op["device"] == device and op["problem"] is None]
        said = ", ".join(f"{chosen.count(name)} by {name}" for name in sorted(set(chosen)))
        problems = [op["problem"] for op in ops if op["device"] == device and op["problem"] is not None]
        lines.append(f"kernels      on {device}: {said or 'none'}; --kernels says which, and why")
        lines += [f"             {problem}" for problem in dict.fromkeys(problems)]
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "vitlr":  # run from a source tree
        import vitlr

        return f"{vitlr.__version__} (not installed, run from {os.path.dirname(vitlr.__file__)})"
    return None


def _triton() -> dict[str, Any]:
    try:
        import triton
    except ImportError as cause:
        return {"runs": False, "why_not": f"it does not import: {one_line(cause)}"}
    if not torch.cuda.is_available():
        return {"runs": False, "why_not": f"triton {triton.__version__} is there, but torch sees no CUDA device"}
    return {"runs": True, "why_not": None}


def _devices() -> list[dict[str, str]]:
    found = [{"name": "cpu", "description": f"{processor()}, torch uses {torch.backends.cpu.get_cpu_capability()}"}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size, capability = card.total_memory / 2**30, f"{card.major}.{card.minor}"
            description = f"{card.name}, {size:.0f} GiB, compute capability {capability}"
            found.append({"name": f"cuda:{index}", "description": description})
    return found


def _native() -> dict[str, Any]:
    from vitlr.ops.backends import native

    status: dict[str, Any] = {"available": native.available(), "why_not": native.why_not()}
    try:
        info = native.build_info()
    except InputError as cause:  # VITLR_CPU_ISA names what cannot run
        status["why_not"] = str(cause)
        info = {"compiler": None, "isa_compiled": (), "isa_used": None, "openmp": False}
    return {**status, **info, "isa_compiled": list(info["isa_compiled"])}


def _cuda() -> dict[str, Any]:
    """What of csrc/cuda was built and for what; why it cannot be used here; and whether it ever ran on a GPU."""
    from vitlr.ops import candidates
    from vitlr.ops.backends import native

    info = native.cuda_build_info()
    built = info["why_not"] is None
    why_not = native.cuda_why_not(torch.device("cuda", 0)) if built else info["why_not"]
    every = [c for op in _shapes(torch.device("cpu")) for c in candidates(op) if c.backend == "cuda"]
    untried = [candidate.name for candidate in every if not candidate.ran_on]
    state = f"compiled, not run on a GPU: {', '.join(untried)}" if untried else "every kernel has run on a GPU"
    return {"built": built, **info, "why_not": why_not, "state": state}


def _shapes(device: torch.device) -> dict[str, dict[str, Any]]:
    """One call of every op, as a block of ViT-B or its decomposition makes it: fp32 on a CPU, bf16 on a GPU."""
    on = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32, "device": device}
    layer = {"M": _ROWS, "K": _WIDTH, **on}
    return {
        "gram_update_": {"T": _ROWS, "n": _WIDTH, **on},
        "weighted_gram_chain": {"b": _BLOCKS, "m": _WIDTH, "k": _WIDTH, "device": device},
        "attention": {"M": 12 * _ROWS, "S": 197, "d": 64, **on},
        "batched_solve": {"b": 4 * _BLOCKS, "n": _WIDTH, "device": device},
        "eigh": {"b": 4 * _BLOCKS, "n": _WIDTH, "device": device},
        "lowrank_linear": {**layer, "N": 3 * _WIDTH, "r": _RANK},
        "lowrank_residual_linear": {**layer, "N": 3 * _WIDTH, "r": _RANK, "form": "int8", "group_size": 64},
        "lowrank_mlp": {**layer, "D": _HIDDEN, "N": _WIDTH, "r1": _RANK, "r2": _RANK},
        "lowrank_glu": {**layer, "D": _HIDDEN * 2 // 3, "N": _WIDTH, "rg": _RANK, "rv": _RANK, "r2": _RANK},
        "round_to_steps": {"N": 3 * _WIDTH, "K": _WIDTH, "device": device},
        "int8_attention": {
            "M": _ROWS,
            "L": 197,
            "before": (_WIDTH, 3 * _WIDTH),
            "after": (_WIDTH,) * 2,
            "heads": 12,
            **on,
        },
        "int8_chain": {"M": _ROWS, "widths": (_WIDTH, _HIDDEN, _WIDTH), "acts": ("gelu", "none"), **on},
        "fp8_chain": {"M": _ROWS, "widths": (_WIDTH, _HIDDEN, _WIDTH), "acts": ("gelu", "none"), **on},
    }


def _explained(op: str, device: dict[str, str]) -> dict[str, Any]:
    from vitlr.ops import explain
    from vitlr.ops.linalg import gram, rounding  # noqa: F401 (they register their ops)

    where = torch.device(device["name"])
    answer: dict[str, Any] = {"op": op, "device": device["name"], "chosen": None, "candidates": [], "problem": None}
    try:
        found = explain(op, **_shapes(where)[op])
    except InputError as cause:  # VITLR_BACKEND names what cannot run
        return {**answer, "table": "", "problem": str(cause)}
    rows = [
        {"candidate": row.candidate, "runs": row.runs, "why": row.why, "ran_on": list(row.ran_on)} for row in found.rows
    ]
    return {**answer, "chosen": found.chosen, "candidates": rows, "table": str(found)}
