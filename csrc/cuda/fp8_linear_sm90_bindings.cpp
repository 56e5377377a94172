// fp8_linear_sm90(q, W, y, M, K, N, act, parts, rows_scale, squares, scale, bias, reach, y_scale, y_squares, ctas, device,
// stream): addresses of contiguous matrices of bytes and of vectors in fp32; bias may be 0. ctas: CTAs at most, 0 for as
// many as there are processors.
#include <pybind11/pybind11.h>

#include "cuda/fp8_tile.h"
#include "cuda/status.h"

namespace py = pybind11;
using namespace vitlr::cuda;
using namespace vitlr::cuda::fp8;

namespace {

constexpr const char* kName = "the kernel of 8-bit floats for Hopper";

// What TMA asks of matrices and loads of pairs of vectors.
void require(const Matrices& p, const Sizes& sizes, int device) {
  require_capability(device, 90, true, kName);
  require_on_device(
      {
          {p.q, "q", 16, false},
          {p.W, "W", 16, false},
          {p.y, "y", 16, false},
          {sizes.rows_scale, "the rows' scale", 4, false},
          {sizes.squares, "the rows' squares", 4, false},
          {sizes.reach, "reach", 4, false},
          {sizes.y_scale, "y's scale", 4, false},
          {sizes.y_squares, "y's squares", 4, false},
          {sizes.scale, "scale", 8, false},
          {sizes.bias, "bias", 8, true},
      },
      device);
  if (sizes.act < Act::none || sizes.act > Act::relu) refuse("no such activation");
  const std::string why = objection(sizes);
  if (!why.empty()) refuse(why);
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace

void register_fp8_linear_sm90(py::module_& m) {
  m.def("fp8_linear_sm90", [](uintptr_t q, uintptr_t W, uintptr_t y, int M, int K, int N, int act, int parts,
                              uintptr_t rows_scale, uintptr_t squares, uintptr_t scale, uintptr_t bias, uintptr_t reach,
                              uintptr_t y_scale, uintptr_t y_squares, int ctas, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const Matrices matrices{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(W),
                            reinterpret_cast<void*>(y)};
    const Sizes sizes{M, K, N, static_cast<Act>(act), parts, floats(rows_scale), floats(squares), floats(scale),
                      floats(bias), floats(reach), reinterpret_cast<float*>(y_scale),
                      reinterpret_cast<float*>(y_squares)};
    require(matrices, sizes, device);
    const int most = ctas > 0 ? ctas : attribute(cudaDevAttrMultiProcessorCount, device);
    launch_linear(matrices, sizes, most, reinterpret_cast<void*>(stream));
  });
}
