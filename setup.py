"""Builds the optional extension `vitlr._C` from csrc/; everything static is in pyproject.toml.

It needs a C++ compiler and pybind11, never torch. A build that fails is recorded in `vitlr/_build_failure.txt` (pip
hides what is printed here; `vitlr doctor` shows the file) and the package installs without the extension.
Environment: VITLR_SKIP_NATIVE_BUILD=1 skips the extension, CXX chooses the compiler.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno"]
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/gram.cpp", "csrc/cpu/chain.cpp"]
# The same source, compiled once for each instruction set and chosen at run time.
GRAM, CHAIN = "csrc/cpu/gram_kernel.cpp", "csrc/cpu/chain_kernel.cpp"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
ISAS = {
    "portable": ([], [GRAM, CHAIN]),
    "avx2": (["-mavx2", "-mfma"], [GRAM, CHAIN]),
    "avx512": (AVX512, [GRAM, CHAIN]),
    "avx512_bf16": ([*AVX512, "-mavx512bf16"], [CHAIN]),
}


class BuildNative(build_ext):
    """build_ext with flags per instruction set, whose failure does not fail the install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        failure = target.with_name("_build_failure.txt")
        failure.unlink(missing_ok=True)
        try:
            self._build(ext)
        except Exception as cause:
            # Whatever went wrong (no compiler, no pybind11, an old assembler), plain torch still works.
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{type(cause).__name__}: {cause}".splitlines()[0] + "\n")
            self.warn(f"vitlr is installed without its native part: {cause}")

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


def extensions() -> list[Extension]:
    """The CPU extension; a CUDA part would add its objects to the same module."""
    if os.environ.get("VITLR_SKIP_NATIVE_BUILD", "0") not in ("", "0"):
        return []
    depends = [GRAM, CHAIN, *map(str, Path("csrc").glob("cpu/*.h"))]
    # optional: an editable install, which copies what was built, does not miss what was not.
    return [Extension("vitlr._C", SOURCES, depends=depends, include_dirs=["csrc"], language="c++", optional=True)]


KERNELS = ["vitlr.triton_kernels", *(f"vitlr.triton_kernels.{name}" for name in find_packages("triton_kernels"))]

setup(
    packages=[*find_packages(include=["vitlr", "vitlr.*"]), *KERNELS],
    package_dir={"vitlr.triton_kernels": "triton_kernels"},
    package_data={
        "vitlr": ["py.typed", "_build_failure.txt", "ops/measured/*.json"],
        "vitlr.triton_kernels": ["tuned/*.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
