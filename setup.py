"""Builds the optional extensions `vitlr._C` and `vitlr._cuda` from csrc/; everything static is in pyproject.toml.

They need a C++ compiler and pybind11, the second one nvcc as well, never torch. A build that fails is recorded in
`vitlr/_build_failure.txt` or `vitlr/_cuda_build_failure.txt` (pip hides what is printed here; `vitlr doctor` shows
them) and the package installs without the extension.
Environment: VITLR_SKIP_NATIVE_BUILD=1 skips both, VITLR_SKIP_CUDA_BUILD=1 the CUDA part, VITLR_FORCE_CUDA=1 makes its
failure that of the install, CXX chooses the compiler; what steers nvcc is told in csrc/nvcc.py.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Not on the path of an isolated build.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import nvcc

CUDA = "vitlr._cuda"
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
SOURCES = [
    "csrc/bindings.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("isa", "gram", "gram_digits", "rounding", "chain", "int8_chain")),
    *(f"csrc/cpu/{name}.cpp" for name in ("attention", "int8_attention")),
]
# The same source, compiled once for each instruction set and chosen at run time.
GRAM, CHAIN, ATTENTION, INT8 = (f"csrc/cpu/{name}_kernel.cpp" for name in ("gram", "chain", "attention", "int8_chain"))
DIGITS = "csrc/cpu/gram_digits_kernel.cpp"
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]  # whatever multiplies bf16 multiplies bytes as well
ISAS = {
    "portable": ([], [GRAM, CHAIN, ATTENTION, INT8]),
    "avx2": (AVX2, [GRAM, CHAIN, ATTENTION, INT8]),
    "avx_vnni": ([*AVX2, "-mavxvnni"], [INT8]),
    "avx512": (AVX512, [GRAM, CHAIN, ATTENTION, INT8]),
    "avx512_vnni": ([*AVX512, "-mavx512vnni"], [INT8]),
    "avx512_bf16": (BF16, [CHAIN, ATTENTION, INT8]),
    # Every CPU with one of them has both.
    "amx_int8": ([*BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"], [DIGITS, ATTENTION, INT8]),
}


class BuildNative(build_ext):
    """build_ext with flags per instruction set, whose failure does not fail the install."""

    def build_extension(self, ext: Extension) -> None:
        target, cuda = Path(self.get_ext_fullpath(ext.name)), ext.name == CUDA
        # What an editable install built before, and why not, lies beside the sources.
        places = [target, *[Path("vitlr") / target.name] * self.editable_mode]
        failures = [place.with_name("_cuda_build_failure.txt" if cuda else "_build_failure.txt") for place in places]
        for failure in failures:
            failure.unlink(missing_ok=True)
        try:
            if cuda:
                _build_cuda(target)
            else:
                self._build(ext)
        except Exception as cause:
            # Whatever went wrong (no compiler, no pybind11, an old assembler), plain torch still works.
            for place in places:
                place.unlink(missing_ok=True)
            if cuda and _is_set("VITLR_FORCE_CUDA"):
                raise
            for failure in failures:
                failure.parent.mkdir(parents=True, exist_ok=True)
                failure.write_text(f"{type(cause).__name__}: {cause}".splitlines()[0] + "\n")
            self.warn(f"vitlr is installed without its {'CUDA' if cuda else 'native'} part: {cause}")

    def _build(self, ext: Extension) -> None:
        import pybind11

        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"the {self.compiler.compiler_type} compiler has no vector extensions; use GCC or Clang")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = [isa for isa, (flags, _) in ISAS.items() if not flags or (x86 and self._compiles(flags))]
        openmp = ["-fopenmp"] if self._compiles(["-fopenmp"], "#include <omp.h>\n") else []
        ext.include_dirs.append(pybind11.get_include())
        ext.extra_compile_args = [*COMMON, *openmp]
        ext.extra_link_args = [*openmp]
        ext.define_macros = [(f"VITLR_WITH_{isa.upper()}", "1") for isa in isas]
        ext.define_macros.append(("VITLR_BINDINGS", f"{zlib.crc32(Path(SOURCES[0]).read_bytes())}u"))
        for isa in isas:
            flags, sources = ISAS[isa]
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=str(Path(self.build_temp) / isa),  # the object is named after its source: one folder each
                macros=[("VITLR_ISA", isa)],
                include_dirs=["csrc"],
                extra_postargs=[*COMMON, *flags],
            )
        super().build_extension(ext)

    def _compiles(self, flags: list[str], include: str = "") -> bool:
        """Whether a program compiles and links with these flags: macOS' Clang has no OpenMP, GCC 9 no AVX512-BF16."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(f"{include}int main() {{ return 0; }}\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=flags)
            except Exception:
                return False
        return True


def _build_cuda(target: Path) -> None:
    """All of csrc/cuda as one module, by nvcc alone: setuptools knows no such compiler."""
    if _is_set("VITLR_SKIP_CUDA_BUILD"):
        raise nvcc.BuildError("VITLR_SKIP_CUDA_BUILD was set")
    if sys.platform != "linux":
        raise nvcc.BuildError(f"it is built on Linux, this is {sys.platform}")
    archs = nvcc.architectures()
    objects = nvcc.compile_all(nvcc.sources(archs), archs)
    nvcc.link([compiled.object for compiled in objects], target)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def extensions() -> list[Extension]:
    """The CPU extension and the CUDA one."""
    if _is_set("VITLR_SKIP_NATIVE_BUILD"):
        return []
    depends = [GRAM, DIGITS, CHAIN, ATTENTION, INT8, *map(str, Path("csrc").glob("cpu/*.h"))]
    # optional: an editable install, which copies what was built, does not miss what was not.
    cpu = Extension("vitlr._C", SOURCES, depends=depends, include_dirs=["csrc"], language="c++", optional=True)
    newer = [*map(str, Path("csrc").glob("cuda/*")), "csrc/nvcc.py"]
    return [cpu, Extension(CUDA, [], depends=newer, optional=not _is_set("VITLR_FORCE_CUDA"))]


KERNELS = ["vitlr.triton_kernels", *(f"vitlr.triton_kernels.{name}" for name in find_packages("triton_kernels"))]

setup(
    packages=[*find_packages(include=["vitlr", "vitlr.*"]), *KERNELS],
    package_dir={"vitlr.triton_kernels": "triton_kernels"},
    package_data={
        "vitlr": ["py.typed", "*.pyi", "_build_failure.txt", "_cuda_build_failure.txt", "ops/measured/*.json"],
        "vitlr.triton_kernels": ["tuned/*.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
