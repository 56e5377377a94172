"""What the gate needs before it can start where there is only a copy of this tree: no pip, no network.

`vitlr.triton_kernels` becomes a link to triton_kernels/, and csrc/cuda is compiled for sm_90a by nvcc, once as it is
and, where something hung, once with waits that give up and name their barrier.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from bench.common import BUILD, ROOT

DEBUG = BUILD / "debug"


def link_kernels() -> None:
    """Make `vitlr.triton_kernels` importable from this tree; an install has its own way."""
    if importlib.util.find_spec("vitlr.triton_kernels") is None:
        with contextlib.suppress(FileExistsError):  # two gates side by side
            os.symlink("../triton_kernels", ROOT / "vitlr" / "triton_kernels")
        importlib.invalidate_caches()


def extension(debug: bool = False) -> Path:
    """Where `vitlr._cuda` lies."""
    return (DEBUG if debug else ROOT / "vitlr") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(debug: bool = False) -> dict[str, Any]:
    """Compile and link `vitlr._cuda` for sm_90a; what ptxas said of its kernels. Raises nvcc.BuildError."""
    nvcc = _nvcc()
    archs = nvcc.architectures("9.0a")
    made = nvcc.compile_all(nvcc.sources(archs), archs, bounded=debug)
    nvcc.link([one.object for one in made], extension(debug))
    (ROOT / "vitlr" / "_cuda_build_failure.txt").unlink(missing_ok=True)
    kernels = [kernel for one in made for kernel in nvcc.resources(one.log)]
    return {"kernels": len(kernels), "spilled": [kernel.kernel for kernel in kernels if kernel.spilled]}


def load_debug() -> Any:
    """The debug build in place of `vitlr._cuda`, for this process. Raises ImportError where it was not built."""
    name = "vitlr._cuda"
    if not extension(debug=True).is_file():
        raise ImportError("the debug build is not there")
    if name in sys.modules:
        raise ImportError("the ordinary build is loaded already")
    loader = importlib.machinery.ExtensionFileLoader(name, str(extension(debug=True)))
    spec = importlib.util.spec_from_file_location(name, extension(debug=True), loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on; `gpu` is None on a CPU."""
    import triton

    from bench.common import machine

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {**machine(), "gpu": gpu, "cuda": torch.version.cuda, "triton": triton.__version__}


def _nvcc() -> Any:
    if str(ROOT / "csrc") not in sys.path:
        sys.path.insert(0, str(ROOT / "csrc"))
    return importlib.import_module("nvcc")
