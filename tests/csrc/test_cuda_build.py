"""How the CUDA part is built: targets, cache, failures; what ptxas says of it; that it loads without a driver."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution, Extension

from vitlr.errors import InputError
from vitlr.ops.backends import native

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc" / "nvcc.py").is_file():
    pytest.skip("not run from a source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / "csrc"))
nvcc = importlib.import_module("nvcc")
pytest.importorskip("pybind11", reason="the bindings are built with pybind11")
BOUNDS = {  # registers that keep as many blocks on a multiprocessor as each kernel was made for
    "product_kernelINS0_5TilesILi128E": 255,  # one block of 256 threads
    "product_kernelINS0_5TilesILi64E": 168,  # three of 128
    "substitution_kernel": 168,  # three
    "factor_kernel": 168,  # three
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("VITLR_") and name != "VITLR_BUILD_CACHE"]:
        monkeypatch.delenv(name)


@pytest.fixture
def real_nvcc() -> str:
    try:
        path = nvcc.find()
        nvcc.version(path)
    except nvcc.BuildError as reason:
        pytest.skip(str(reason))
    return path


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, ["sm_80, PTX 80", "sm_90a"]),
        ("8.0", ["sm_80"]),
        ("7.5 8.0;9.0+PTX", ["sm_80", "sm_90, PTX 90"]),
        ("9.0a, 9.0a+PTX", ["sm_90a, PTX 90a"]),
        ("12.0", ["sm_120"]),
    ],
)
def test_targets(listed, expected, monkeypatch):
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert [str(arch) for arch in nvcc.architectures()] == expected


@pytest.mark.parametrize(("listed", "message"), [("Hopper", "'Hopper' is no architecture"), ("7.5", "from 8.0 on")])
def test_targets_that_are_none(listed, message):
    with pytest.raises(nvcc.BuildError, match=message):
        nvcc.architectures(listed)


def test_a_kernel_for_hopper_alone_is_built_for_it_alone():
    both, old = nvcc.architectures("8.0;9.0a"), nvcc.architectures("8.0")
    assert [arch.number for arch in nvcc.taken("csrc/cuda/x_sm90.cu", both)] == ["90a"]
    for name in ("csrc/cuda/x_sm90.cu", "csrc/cuda/x_sm90_bindings.cpp"):
        assert not nvcc.taken(name, old) and nvcc.taken(name, both)
    assert len(nvcc.taken("csrc/cuda/x.cu", both)) == 2


FAKE = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
echo "$*" >> {log}
for word in "$@"; do case "$word" in *broken*) echo "x.cu(3): error: it is broken"; exit 2;; esac; done
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
echo "ptxas info    : all is well"
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree with a fake nvcc that notes its calls, and a cache of its own; what it was called with."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text('#include "cuda/one.h"\n')
    (tmp_path / "csrc" / "cuda" / "two.cu").write_text("int two;\n")
    (tmp_path / "csrc" / "cuda" / "one.h").write_text('#include "deep.h"\n#include <vector>\n')
    (tmp_path / "csrc" / "cuda" / "deep.h").write_text("// deep\n")
    log, fake = tmp_path / "calls", tmp_path / "nvcc"
    log.write_text("")
    fake.write_text(FAKE.format(log=log))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(nvcc, "ROOT", tmp_path)
    monkeypatch.setenv("CUDACXX", str(fake))
    monkeypatch.setenv("VITLR_BUILD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def compiled(tree: Path) -> list[str]:
    """The sources for which nvcc has been called since the last time."""
    log = tree / "calls"
    lines = log.read_text().splitlines()
    log.write_text("")
    return sorted(line.split(" -c ")[1].split()[0] for line in lines if " -c " in line)


def test_objects_are_kept_until_something_changes(tree, monkeypatch):
    archs = nvcc.architectures()
    names = nvcc.sources(archs)
    assert names == ["csrc/cuda/one.cu", "csrc/cuda/two.cu"]
    first = nvcc.compile_all(names, archs)
    assert compiled(tree) == names and all(c.object.read_text() == "made\n" and "all is well" in c.log for c in first)
    assert nvcc.compile_all(names, archs) == first and compiled(tree) == []
    (tree / "csrc" / "cuda" / "deep.h").write_text("// deeper\n")
    again = nvcc.compile_all(names, archs)
    assert compiled(tree) == names[:1] and again[0].object != first[0].object and again[1] == first[1]
    nvcc.compile_all(names, nvcc.architectures("8.0"))
    assert compiled(tree) == names
    monkeypatch.setattr(nvcc, "version", lambda path: "nvcc 13.9.9")
    nvcc.compile_all(names, archs)
    assert compiled(tree) == names


def test_a_failure_is_one_line_and_nothing_of_it_is_kept(tree):
    (tree / "csrc" / "cuda" / "broken.cu").write_text("int x\n")
    archs = nvcc.architectures()
    with pytest.raises(nvcc.BuildError, match=r"^nvcc failed with status 2: x.cu\(3\): error: it is broken$"):
        nvcc.compile_all(["csrc/cuda/broken.cu"], archs)
    assert list((tree / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(tree, monkeypatch):
    (tree / "file").write_text("")
    monkeypatch.setenv("VITLR_BUILD_CACHE", str(tree / "file" / "below"))
    archs = nvcc.architectures()
    (made,) = nvcc.compile_all(["csrc/cuda/two.cu"], archs)
    assert made.object.read_text() == "made\n" and tree not in made.object.parents


def test_as_many_processes_as_asked_for(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert nvcc.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert nvcc.jobs() == len(os.sched_getaffinity(0))


def test_no_nvcc_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    with pytest.raises(nvcc.BuildError, match=f"no nvcc at {tmp_path}/nvcc; install the CUDA toolkit or set CUDA_HOME"):
        nvcc.find()
    (tmp_path / "old").write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n')
    (tmp_path / "old").chmod(0o755)
    with pytest.raises(nvcc.BuildError, match=r"V11\.8\.89, needed is CUDA 12\.0"):
        nvcc.version(str(tmp_path / "old"))


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that runs setup.py's build of the CUDA extension alone; the folder where it lands."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))

    def run() -> Path:
        forced = os.environ.get("VITLR_FORCE_CUDA") == "1"
        extension = Extension("vitlr._cuda", [], optional=not forced)
        command = given["cmdclass"]["build_ext"](Distribution({"name": "vitlr", "ext_modules": [extension]}))
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        return tmp_path / "lib" / "vitlr"

    return run


def test_a_build_that_fails_says_why_and_fails_nothing(build, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    folder = build()
    reason = "BuildError: no nvcc at /nowhere/nvcc; install the CUDA toolkit or set CUDA_HOME\n"
    assert [path.name for path in folder.iterdir()] == ["_cuda_build_failure.txt"]
    assert (folder / "_cuda_build_failure.txt").read_text() == reason
    monkeypatch.setenv("VITLR_SKIP_CUDA_BUILD", "1")
    assert (build() / "_cuda_build_failure.txt").read_text() == "BuildError: VITLR_SKIP_CUDA_BUILD was set\n"


def test_forced_it_fails_the_install(build, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    monkeypatch.setenv("VITLR_FORCE_CUDA", "1")
    with pytest.raises(Exception, match="no nvcc at /nowhere/nvcc"):
        build()


def test_the_reason_is_told_where_the_module_is_missing(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    native._load_cuda.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", missing)
    (tmp_path / "why.txt").write_text("BuildError: no nvcc at all\n")
    monkeypatch.setattr(native, "_CUDA_FAILURE", tmp_path / "why.txt")
    try:
        assert native.cuda_why_not() == "vitlr._cuda was not built: BuildError: no nvcc at all"
        assert native.cuda_build_info() == {"why_not": native.cuda_why_not()}
        with pytest.raises(InputError, match="was not built: BuildError: no nvcc at all"):
            native.cuda()
    finally:
        native._load_cuda.cache_clear()


LOG = """
ptxas info    : Compiling entry function '_Z3oneP' for 'sm_80'
ptxas info    : Function properties for _Z3oneP
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size, 33280 bytes smem
ptxas info    : Compile time = 12.0 ms
ptxas info    : Compiling entry function '_Z3twoP' for 'sm_90a'
ptxas info    : Function properties for _Z3twoP
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_what_ptxas_says_is_understood():
    one, two = nvcc.resources(LOG)
    assert one == nvcc.Resources("_Z3oneP", "sm_80", 128, 8, 40, 33280)
    assert two == nvcc.Resources("_Z3twoP", "sm_90a", 32, 0, 0, 0)


def test_kernels_keep_to_their_registers(real_nvcc):
    """For sm_80 and sm_90a, with the PTX of 8.0 beside them: objects that the install has made come from the cache."""
    archs = nvcc.architectures()
    names = [name for name in nvcc.sources(archs) if name.endswith(".cu")]
    for name, made in zip(names, nvcc.compile_all(names, archs), strict=True):
        found = nvcc.resources(made.log)
        expected = {f"sm_{arch.number}" for arch in nvcc.taken(name, archs)}
        assert found and {kernel.target for kernel in found} == expected, name
        assert "warning" not in made.log, name
        for kernel in found:
            assert kernel.spilled == 0 and kernel.stack == 0, kernel
            bound = next((most for part, most in BOUNDS.items() if part in kernel.kernel), 255)
            assert kernel.registers <= bound, kernel


def test_tensor_cores_of_each_architecture_are_used(real_nvcc, tmp_path):
    """fp64 by mma of 8x8x4 in the PTX of 8.0, of 16x8x8 in that of 9.0."""
    for arch, instruction in (("80", "mma.sync.aligned.m8n8k4"), ("90a", "mma.sync.aligned.m16n8k8")):
        ptx = tmp_path / f"{arch}.ptx"
        command = [real_nvcc, "-std=c++17", "-O3", "-Icsrc", "-ptx", f"-arch=compute_{arch}"]
        subprocess.run([*command, "csrc/cuda/weighted_chain.cu", "-o", str(ptx)], cwd=ROOT, check=True)
        text = ptx.read_text()
        assert f"{instruction}.row.col.f64" in text and "cp.async.ca.shared.global" in text


needs_module = pytest.mark.skipif(native.cuda_why_not() is not None, reason=str(native.cuda_why_not()))


@needs_module
def test_the_module_brings_its_runtime_and_no_library_of_cuda():
    path = Path(native.cuda().__file__)
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    text = subprocess.run([readelf, "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line for line in text.splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line or "cu" in line.rpartition("[lib")[2][:2]], needed
    exported = subprocess.run([readelf, "--dyn-syms", "-W", str(path)], capture_output=True, text=True).stdout
    ours = [line for line in exported.splitlines() if " UND " not in line and "GLOBAL" in line]
    assert any("PyInit__cuda" in line for line in ours) and not [line for line in ours if " cuda" in line]


@needs_module
def test_what_was_built_is_told():
    info = native.cuda_build_info()
    assert info["why_not"] is None and info["compiler"].startswith("nvcc ") and "sm_" in info["targets"]
    assert native.cuda().panel == 64


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_every_call_says_what_to_do():
    refusal = native.cuda_why_not(torch.device("cuda", 0)) or ""
    assert "cudaErrorInsufficientDriver" in refusal or "cudaErrorNoDevice" in refusal
    assert "nvidia-smi" in refusal and "VITLR_BACKEND=torch" in refusal
    nothing, module = (0, 0, 0, 0), native.cuda()
    for call, arguments in (
        (module.weighted_chain, (nothing, nothing, nothing, 1, 8, 8, 8, False, False, False, False)),
        (module.cholesky, (nothing, nothing, 0, 0, 0, 1, 8)),
        (module.back_substitution, (nothing, nothing, nothing, 0, 1, 8, 8)),
    ):
        with pytest.raises(RuntimeError, match=r"cudaGetDevice: cudaError.*nvidia-smi"):
            call(*arguments, 0, 0)


@needs_module
def test_what_the_module_refuses_is_an_input_error(monkeypatch):
    class Stream:
        cuda_stream = 7

    def refuses(*arguments):
        assert arguments == ("x", 3, 7)
        raise ValueError("X does not lie on CUDA device 3")

    class Module:
        chain = staticmethod(refuses)

    monkeypatch.setattr(native, "_load_cuda", lambda: Module())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(InputError, match="chain: X does not lie on CUDA device 3"):
        native.cuda_call("chain", "x", device=torch.device("cuda", 3))
