// weighted_chain(X, Y, out, batch, M, N, K, symmetric, upper_X, lower_Y, upper_Y, device, stream): out = X Y.
#include "cuda/matrix_argument.h"
#include "cuda/status.h"
#include "cuda/weighted_chain.h"

namespace py = pybind11;
using namespace vitlr::cuda;

void register_weighted_chain(py::module_& m) {
  m.def("weighted_chain", [](const py::tuple& X, const py::tuple& Y, const py::tuple& out, int64_t batch, int64_t M,
                             int64_t N, int64_t K, bool symmetric, bool upper_X, bool lower_Y, bool upper_Y, int device,
                             uintptr_t stream) {
    const DeviceGuard guard(device);
    launch_weighted_chain({matrix_of(X), matrix_of(Y), matrix_of(out), batch, M, N, K, symmetric, upper_X, lower_Y, upper_Y},
                          device, reinterpret_cast<cudaStream_t>(stream));
  });
}
