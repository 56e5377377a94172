"""Compile a kernel for an architecture that is not there, and read what the compiler made of it.

The proof that needs no GPU: registers, spilled bytes, shared memory, and whether the tensor cores are used.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from .targets import Target, Unsupported, interpreting

_TENSOR_CORES = {  # the instruction by which each architecture multiplies matrices
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
}
_MMA = r"\bmma\.sync"


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: `types` of its arguments as Triton writes them, `constants` of its constexprs.

    `aligned` names arguments divisible by 16 (addresses in bytes, strides in elements), as dispatch sees them in
    real models; "Xs.0" is the first of a tuple. `registers`: the most that are allowed, by target. `tensor_cores`:
    whether they must be used. `shared`: bytes of shared memory that the config function reckons with at the most.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    registers: Mapping[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    tensor_cores: bool = True
    shared: int | None = None


@dataclass(frozen=True)
class Report:
    """What the compiler says: registers a thread, bytes spilled a thread, bytes of shared memory a block."""

    case: str
    target: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: bool
    problems: tuple[str, ...]


def compile_case(case: Case, target: Target) -> Report:
    """Compile a case and hold it against its bounds; what breaks them is listed in `problems`.

    Raises RuntimeError inside Triton's interpreter, which cannot compile, and whatever the compiler raises.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter cannot compile")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.types and name not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: no type or value for {', '.join(missing)}")
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    paths = [name.split(".") for name in case.aligned]
    attributes = {(names.index(name), *map(int, rest)): [["tt.divisibility", 16]] for name, *rest in paths}
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's own remarks about its defaults
        compiled = triton.compile(source, GPUTarget(target.backend, target.arch, 32), options)
    text = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"])
    used = re.search(_TENSOR_CORES.get(target.name, _MMA), text) is not None
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if compiled.metadata.shared > target.shared_memory:
        problems.append(f"takes {compiled.metadata.shared} bytes of shared memory, {target.shared_memory} are there")
    if case.shared is not None and compiled.metadata.shared > case.shared:
        problems.append(f"takes {compiled.metadata.shared} bytes of shared memory, its config says {case.shared}")
    if case.tensor_cores and not used:
        problems.append("does not use the tensor cores")
    if target.name == "sm_90" and used and _serialised(text):
        problems.append("serialises its wgmma")
    bound = case.registers.get(target.name)
    if bound is not None and registers > bound:
        problems.append(f"takes {registers} registers, at most {bound} are allowed")
    return Report(case.name, target.name, registers, spilled, compiled.metadata.shared, used, tuple(problems))


def where_taken(case: Callable[..., Case]) -> Callable[..., list[Case]]:
    """The function with its one case in a list, or no case where its config raises Unsupported for the target."""

    @wraps(case)
    def cases(*args: Any, **options: Any) -> list[Case]:
        try:
            return [case(*args, **options)]
        except Unsupported:
            return []

    return cases


def _largest(pattern: str, text: str) -> int:
    return max((int(found) for found in re.findall(pattern, text)), default=0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as machine code says it; what the compiler spills lies on the stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _largest(r"REG:(\d+)", text), _largest(r"STACK:(\d+)", text) + _largest(r"LOCAL:(\d+)", text)


def _serialised(ptx: str) -> bool:
    """Whether the assembler waits for each wgmma before it issues the next, which it says but does not fail for."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    # Triton 3.9 writes PTX of a version newer than this assembler takes, and makes its machine code by another one that
    # is no program: nothing to ask there, so only what an assembler did say counts.
    return "serializ" in done.stdout + done.stderr
