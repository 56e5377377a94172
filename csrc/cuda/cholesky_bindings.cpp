// cholesky(F, L, inverse, shift, info, batch, n, device, stream): F + shift 1 = L Lᵀ.
// back_substitution(L, U, P, inverse, batch, n, columns, device, stream): P = L⁻ᵀ U.
#include "cuda/cholesky.h"
#include "cuda/matrix_argument.h"
#include "cuda/status.h"

namespace py = pybind11;
using namespace vitlr::cuda;

void register_cholesky(py::module_& m) {
  m.attr("panel") = kPanel;
  m.def("cholesky", [](const py::tuple& F, const py::tuple& L, uintptr_t inverse, uintptr_t shift, uintptr_t info,
                       int64_t batch, int64_t n, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    launch_cholesky({matrix_of(F), matrix_of(L), reinterpret_cast<double*>(inverse),
                     reinterpret_cast<const double*>(shift), reinterpret_cast<int32_t*>(info), batch, n},
                    device, reinterpret_cast<cudaStream_t>(stream));
  });
  m.def("back_substitution", [](const py::tuple& L, const py::tuple& U, const py::tuple& P, uintptr_t inverse,
                                int64_t batch, int64_t n, int64_t columns, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    launch_back_substitution(
        {matrix_of(L), matrix_of(U), matrix_of(P), reinterpret_cast<double*>(inverse), batch, n, columns}, device,
        reinterpret_cast<cudaStream_t>(stream));
  });
}
