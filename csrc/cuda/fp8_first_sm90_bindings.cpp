// fp8_first_sm90(W, y, M, K, r, fp16, x, gamma, beta, eps, scale, bias, reach, y_scale, y_squares, flags, count, ctas,
// device, stream): addresses of contiguous matrices of bytes, of x, gamma and beta in bf16 or fp16, and of vectors in
// fp32; gamma with beta, bias and flags may be 0. flags: `count` numbers of int32 that become zero. ctas: CTAs at
// most, 0 for as many as there are processors.
#include <pybind11/pybind11.h>

#include "cuda/fp8_first_tile.h"
#include "cuda/status.h"

namespace py = pybind11;
using namespace vitlr::cuda;
using namespace vitlr::cuda::fp8_first;

namespace {

constexpr const char* kName = "the first linear of 8-bit floats for Hopper";

// What TMA asks of matrices, and loads of eight numbers.
void require(const Matrices& p, const Sizes& sizes, int device) {
  require_capability(device, 90, true, kName);
  require_on_device(
      {
          {p.W, "W", 16, false},
          {p.y, "y", 16, false},
          {sizes.x, "x", 16, false},
          {sizes.gamma, "gamma", 16, true},
          {sizes.beta, "beta", 16, true},
          {sizes.scale, "scale", 4, false},
          {sizes.bias, "bias", 4, true},
          {sizes.reach, "reach", 4, false},
          {sizes.y_scale, "y's scale", 4, false},
          {sizes.y_squares, "y's squares", 4, false},
          {sizes.flags, "the flags", 4, sizes.count == 0},
      },
      device);
  const std::string why = objection(sizes);
  if (!why.empty()) refuse(why);
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }
const void* numbers(uintptr_t address) { return reinterpret_cast<const void*>(address); }

}  // namespace

void register_fp8_first_sm90(py::module_& m) {
  m.def("fp8_first_sm90", [](uintptr_t W, uintptr_t y, int M, int K, int r, bool fp16, uintptr_t x, uintptr_t gamma,
                             uintptr_t beta, float eps, uintptr_t scale, uintptr_t bias, uintptr_t reach,
                             uintptr_t y_scale, uintptr_t y_squares, uintptr_t flags, int count, int ctas, int device,
                             uintptr_t stream) {
    const DeviceGuard guard(device);
    const Matrices matrices{numbers(W), reinterpret_cast<void*>(y)};
    const Sizes sizes{M, K, r, fp16, numbers(x), numbers(gamma), numbers(beta), eps, floats(scale), floats(bias),
                      floats(reach), reinterpret_cast<float*>(y_scale), reinterpret_cast<float*>(y_squares),
                      reinterpret_cast<int*>(flags), count};
    require(matrices, sizes, device);
    const int processors = ctas > 0 ? ctas : attribute(cudaDevAttrMultiProcessorCount, device);
    launch_first(matrices, sizes, processors, reinterpret_cast<void*>(stream));
  });
}
