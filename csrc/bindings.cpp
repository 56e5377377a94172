// Python bindings over raw pointers: no torch header, so no tie to a torch version. vitlr/ops/_native.py checks
// tensors before they come here; it is the only importer.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/gram.h"

namespace py = pybind11;

namespace {

void gram(uintptr_t C, uintptr_t X, int64_t T, int64_t n, int64_t row_stride, int64_t column_stride, uintptr_t weight,
          int threads, const std::string& isa) {
  const vitlr::GramKernel& kernel = vitlr::select_kernel(isa.c_str());
  py::gil_scoped_release release;
  vitlr::gram_update(reinterpret_cast<double*>(C), reinterpret_cast<const float*>(X), T, n, row_stride, column_stride,
                     reinterpret_cast<const float*>(weight), threads, kernel);
}

py::dict build_info() {
  py::list isas;
#ifdef VITLR_WITH_PORTABLE
  isas.append("portable");
#endif
#ifdef VITLR_WITH_AVX2
  isas.append("avx2");
#endif
#ifdef VITLR_WITH_AVX512
  isas.append("avx512");
#endif
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["isa_compiled"] = py::tuple(isas);
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = "not built: this version has no CUDA sources";
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vitlr; use them through vitlr.ops.";
  m.def("gram", &gram, py::arg("C"), py::arg("X"), py::arg("T"), py::arg("n"), py::arg("row_stride"),
        py::arg("column_stride"), py::arg("weight"), py::arg("threads"), py::arg("isa"));
  m.def("select_isa", [](const std::string& isa) { return vitlr::select_kernel(isa.c_str()).name; }, py::arg("isa"));
  m.def("build_info", &build_info);
}
