"""What ptxas says of every kernel of csrc/cuda."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def compiled() -> list[dict[str, Any]]:
    """One row a kernel and target: source, kernel, target, registers, spilled, shared. Raises where nvcc is missing."""
    sys.path.insert(0, str(ROOT / "csrc"))
    nvcc = importlib.import_module("nvcc")
    archs = nvcc.architectures()
    names = [name for name in nvcc.sources(archs) if name.endswith(".cu")]
    return [
        {"source": made.source, "kernel": _short(r.kernel), "target": r.target, "registers": r.registers}
        | {"spilled": r.spilled, "shared": r.shared}
        for made in nvcc.compile_all(names, archs)
        for r in nvcc.resources(made.log)
    ]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill."""
    return [f"{r['kernel']} on {r['target']}: {r['spilled']} bytes spilled" for r in rows if r["spilled"]]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| source | kernel | target | registers | spilled |", "|---|---|---|---|---|"]
    cells = (
        f"| {Path(r['source']).name} | {r['kernel']} | {r['target']} | {r['registers']} | {r['spilled']} |"
        for r in rows
    )
    return "\n".join([*lines, *cells])


def _short(mangled: str) -> str:
    """A kernel's name as people read it, where c++filt is there."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip()
    return text.replace("vitlr::cuda::", "").replace("(anonymous namespace)::", "").partition("(")[0] or mangled
