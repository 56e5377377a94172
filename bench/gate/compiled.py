"""The part of the gate that needs no GPU: every Triton kernel compiled for every target, its bounds held."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

from vitlr import triton_kernels
from vitlr.triton_kernels.targets import TARGETS

ARCHITECTURES = ("sm_80", "sm_90")


def kernel_modules() -> Iterator[str]:
    """Names of the modules of kernels, those that say by `cases(target)` what is to be compiled."""
    for found in pkgutil.iter_modules(triton_kernels.__path__):
        if hasattr(importlib.import_module(f"vitlr.triton_kernels.{found.name}"), "cases"):
            yield found.name


def compile_all(targets: Sequence[str] = ARCHITECTURES) -> list[dict[str, Any]]:
    """One row a case and target: case, target, registers, spilled, shared, tensor_cores, problems."""
    jobs = []
    for module in kernel_modules():
        for target in targets:
            jobs += [(module, target, index) for index in range(len(_cases(module, target)))]
    # Spawned: the compiler's threads and a CUDA context do not survive a fork.
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs, chunksize=4))


def _cases(module: str, target: str) -> list[Any]:
    return importlib.import_module(f"vitlr.triton_kernels.{module}").cases(TARGETS[target])


def _compile(job: tuple[str, str, int]) -> dict[str, Any]:
    from vitlr.triton_kernels.compilation import compile_case

    module, target, index = job
    case = _cases(module, target)[index]
    try:
        report = asdict(compile_case(case, TARGETS[target]))
    except Exception as cause:  # whatever the compiler raises is the case's problem, and all of them are wanted
        reason = f"does not compile: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"
        return _failed(module, case.name, target, reason[:300])
    return {"module": module, "bound": case.registers.get(target), **report}


def _failed(module: str, case: str, target: str, reason: str) -> dict[str, Any]:
    nothing = {"bound": None, "registers": 0, "spilled": 0, "shared": 0, "tensor_cores": False}
    return {"module": module, "case": case, "target": target, **nothing, "problems": [reason]}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps the gate shut."""
    return [f"{row['case']} on {row['target']}: {problem}" for row in rows for problem in row["problems"]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, targets side by side: registers / KB of shared memory."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for case in dict.fromkeys((row["module"], row["case"]) for row in rows):
        cells = []
        for target in targets:
            found = [row for row in rows if (row["module"], row["case"], row["target"]) == (*case, target)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {case[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if not row["registers"]:
        return "; ".join(row["problems"])
    cell = f"{row['registers']} / {row['shared'] / 1024:.0f}"
    return cell + (f" ({'; '.join(row['problems'])})" if row["problems"] else "")
