// The module vitlr._cuda: addresses, sizes, strides and a stream come from Python, so it has no tie to a torch version.
// vitlr/ops/_native.py is the only importer, and the ops check tensors before they come here.
//
// How a kernel is added (csrc/nvcc.py finds the files by their names, nothing has to be listed there):
//   <name>.h             the parameter struct and `void launch_<name>(const <Name>Params&, cudaStream_t)`; g++ reads it, too
//   <name>.cu            kernels and launch. `..._sm90.cu` is compiled for sm_90a alone, only where that is among the
//                        targets (macro VITLR_WITH_SM90); any other file for every target, so sm_80 at least
//   <name>_bindings.cpp  `void register_<name>(pybind11::module_& m)`, global: the Python signature, integers to parameters
//   below                one line `KERNEL(<name>)` in VITLR_KERNELS, or in VITLR_KERNELS_SM90
// Logic (indices, packing, schedules, epilogues) lives in headers of VITLR_HD functions (host_device.h), which g++
// compiles in tests/csrc. Includes are written from csrc: "cuda/status.h".
//
// What every registered function does:
//   takes addresses as `uintptr_t`, with `int device` and `uintptr_t stream` last; a stream is a cudaStream_t
//   makes a `DeviceGuard guard(device)`, refuses (`refuse`, `require_*` of status.h) before it launches
//   allocates nothing on the device, never synchronises; workspace is an address, its size comes from a function
//   checks every status by `check` and every launch by `check_launch`
// From Python: `_native.cuda_call("<name>", ...)`; ValueError becomes InputError there.
#include <pybind11/pybind11.h>

#include "cuda/status.h"

namespace py = pybind11;

#define VITLR_KERNELS(KERNEL) \
  KERNEL(cholesky)            \
  KERNEL(weighted_chain)

#ifdef VITLR_WITH_SM90
#define VITLR_KERNELS_SM90(KERNEL) \
  KERNEL(fp8_linear_sm90)          \
  KERNEL(fp8_mlp_sm90)             \
  KERNEL(lowrank_sm90)
#else
#define VITLR_KERNELS_SM90(KERNEL)
#endif

#define VITLR_DECLARE(name) void register_##name(py::module_& m);
#define VITLR_REGISTER(name) register_##name(m);
VITLR_KERNELS(VITLR_DECLARE)
VITLR_KERNELS_SM90(VITLR_DECLARE)

namespace {

// What was built: no driver is asked.
py::dict build_info() {
  py::dict info;
  info["compiler"] = VITLR_CUDA_COMPILER;
  info["targets"] = VITLR_CUDA_TARGETS;
  info["runtime"] = CUDART_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of vitlr; use them through vitlr.ops.";
  m.def("build_info", &build_info);
  m.def("capability", &vitlr::cuda::capability, py::arg("device"));
  VITLR_KERNELS(VITLR_REGISTER)
  VITLR_KERNELS_SM90(VITLR_REGISTER)
}
