"""Compiles csrc/cuda with nvcc and links `vitlr._cuda`: one process a file, side by side, objects kept.

Used by setup.py, and by the tests and the gate for what ptxas said of each kernel. Needs nvcc, a C++ compiler, Python's
and pybind11's headers; never torch, never a driver. Files named `..._sm90.cu` are compiled for sm_90a alone.

Environment: CUDACXX or CUDA_HOME says where nvcc is (else the PATH), TORCH_CUDA_ARCH_LIST for which architectures,
MAX_JOBS how many processes at once, VITLR_BUILD_CACHE where objects are kept (default ~/.cache/vitlr/cuda).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = "8.0+PTX;9.0a"
"""A100, H100 and H200; anything newer compiles the PTX of 8.0 when it loads."""
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]


class BuildError(Exception):
    """The CUDA part cannot be built here; the message is one line."""


@dataclass(frozen=True)
class Architecture:
    """One entry of TORCH_CUDA_ARCH_LIST: `number` 80 or "90a" as in sm_90a, and whether its PTX is kept too."""

    number: str
    ptx: bool = False

    @property
    def gencode(self) -> list[str]:
        codes = [f"sm_{self.number}", *[f"compute_{self.number}"] * self.ptx]
        return [f"-gencode=arch=compute_{self.number},code={code}" for code in codes]

    def __str__(self) -> str:
        return f"sm_{self.number}" + f", PTX {self.number}" * self.ptx


@dataclass(frozen=True)
class Compiled:
    """An object file and what the compiler said."""

    source: str
    object: Path
    log: str


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel on one target; bytes, but for registers."""

    kernel: str
    target: str
    registers: int
    stack: int
    spilled: int
    shared: int


def find() -> str:
    """The path of nvcc. Raises BuildError where there is none."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    usual = [*(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    places = [named] if named else usual
    for place in places:
        path = shutil.which(place)
        if path:
            return path
    raise BuildError(f"no nvcc at {', '.join(places)}; install the CUDA toolkit or set CUDA_HOME")


def version(nvcc: str) -> str:
    """Such as `nvcc 13.0.88`. Raises BuildError where it does not run or is older than 12.0."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as cause:
        raise BuildError(f"{nvcc} --version fails: {cause}") from cause
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    if found is None or int(found[1]) < 12:
        raise BuildError(f"{nvcc} is {found[0] if found else 'of no known version'}, needed is CUDA 12.0 or later")
    return f"nvcc {found[1]}.{found[2]}.{found[3]}"


def architectures(wanted: str | None = None) -> list[Architecture]:
    """`wanted` or TORCH_CUDA_ARCH_LIST, from 8.0 on: older ones have no fp64 tensor cores, no asynchronous copies."""
    listed = wanted or os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    found: dict[str, bool] = {}
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is no architecture, expected such as {ARCHITECTURES}")
        if int(match[1]) >= 8:
            number = match[1] + match[2] + match[3]
            found[number] = found.get(number, False) or match[4] is not None
    if not found:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed} names no architecture from 8.0 on")
    return [Architecture(number, ptx) for number, ptx in found.items()]


def taken(source: str, archs: Iterable[Architecture]) -> list[Architecture]:
    """The architectures for which a source is compiled; a kernel for Hopper's own instructions knows one."""
    if re.search(r"_sm90(_bindings)?\.\w+$", source):
        return [Architecture("90a")] if any(arch.number in ("90", "90a") for arch in archs) else []
    return list(archs)


def sources(archs: Sequence[Architecture]) -> list[str]:
    """The sources of `vitlr._cuda`, relative to the root."""
    every = sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")])
    return [name for name in (str(path.relative_to(ROOT)) for path in every) if taken(name, archs)]


def compile_all(
    names: Sequence[str], archs: Sequence[Architecture], nvcc: str | None = None, bounded: bool = False
) -> list[Compiled]:
    """Objects of sources, from the cache where nothing changed. Raises BuildError with the first error.

    `bounded`: the debug build, whose waits give up after seconds and name the barrier (csrc/cuda/bounded_wait.h).
    """
    nvcc = nvcc or find()
    compiler, kept = f"{version(nvcc)}, {_host_version()}", cache()
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(lambda name: _compile(nvcc, compiler, name, archs, kept, bounded), names))


def link(objects: Sequence[Path], target: Path, nvcc: str | None = None) -> None:
    """A module of the objects with the static CUDA runtime inside, whose symbols stay its own: torch brings another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = ["-Xlinker", "--exclude-libs=ALL"]
    _run([nvcc or find(), "-shared", "-cudart", "static", *_host(), *map(str, objects), "-o", str(target), *hidden])


def jobs() -> int:
    """MAX_JOBS, or the cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(os.environ.get("MAX_JOBS") or cores))


def cache() -> Path:
    """Where objects are kept; a folder for this build alone where that one cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("VITLR_BUILD_CACHE") or Path(base) / "vitlr" / "cuda")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="vitlr_cuda_"))
    return folder


def resources(log: str) -> list[Resources]:
    """What `-Xptxas -v` said of every kernel in a log."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for kernel, target, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        smem = re.search(r"(\d+) bytes smem", rest)
        spilled, shared = int(stores) + int(loads), int(smem[1]) if smem else 0
        found.append(Resources(kernel, f"sm_{target}", int(registers), int(stack), spilled, shared))
    return found


def _compile(
    nvcc: str, compiler: str, name: str, archs: Sequence[Architecture], folder: Path, bounded: bool
) -> Compiled:
    flags = [flag for arch in taken(name, archs) for flag in arch.gencode] if name.endswith(".cu") else []
    flags += FLAGS
    includes, python = [], ""
    if name.endswith(".cpp"):  # bindings: the folders change with every isolated build, what lies in them does not
        import pybind11

        folders = (sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include())
        includes = [f"-I{folder}" for folder in dict.fromkeys(folders)]
        python = f"pybind11 {pybind11.__version__}, {sysconfig.get_config_var('EXT_SUFFIX')}"
        facts = {"COMPILER": compiler, "TARGETS": "; ".join(map(str, archs))}
        flags += [f'-DVITLR_CUDA_{key}="{value}"' for key, value in facts.items()]
    if any(arch.number in ("90", "90a") for arch in archs):
        flags.append("-DVITLR_WITH_SM90")
    if bounded:
        flags.append("-DVITLR_BOUNDED_WAITS")
    key = hashlib.sha256("\0".join([compiler, python, *flags]).encode())
    for file in _with_headers(name):
        key.update(f"\0{file}\0".encode() + (ROOT / file).read_bytes())
    kept = folder / key.hexdigest()[:32]
    object_, log = kept.with_suffix(".o"), kept.with_suffix(".log")
    if not (object_.is_file() and log.is_file()):
        with tempfile.TemporaryDirectory(dir=folder) as own:  # renamed when whole: builds may run side by side
            fresh = Path(own, "fresh.o")
            told = _run([nvcc, *_host(), *includes, *flags, "-c", name, "-o", str(fresh)])
            fresh.with_suffix(".log").write_text(told)
            fresh.with_suffix(".log").replace(log)
            fresh.replace(object_)
    return Compiled(name, object_, log.read_text())


def _with_headers(name: str) -> list[str]:
    """A source and all of our headers that it includes, by quotes, relative to csrc or to itself."""
    found, todo = [], [name]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.append(file)
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', (ROOT / file).read_text(), re.MULTILINE):
            places = (ROOT / "csrc" / header, (ROOT / file).parent / header)
            todo += [str(place.resolve().relative_to(ROOT)) for place in places if place.is_file()][:1]
    return sorted(found)


def _host() -> list[str]:
    """CXX, if it is set, compiles the host's side."""
    return ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []


def _host_version() -> str:
    try:
        text = subprocess.run([os.environ.get("CXX") or "g++", "--version"], capture_output=True, text=True).stdout
    except OSError as cause:
        raise BuildError(f"no C++ compiler for nvcc: {cause}") from cause
    return (text.splitlines() or ["a C++ compiler"])[0].strip()


def _run(command: list[str]) -> str:
    """stdout and stderr of a command in the root. Raises BuildError with its first error."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        told = next((line for line in lines if "error" in line.lower()), (lines or ["nothing"])[-1])
        sys.stderr.write(done.stdout)
        raise BuildError(f"{Path(command[0]).name} failed with status {done.returncode}: {told}")
    return done.stdout
