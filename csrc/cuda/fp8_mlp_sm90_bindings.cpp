// fp8_mlp_sm90(q, W1, W2, W3, y, M, r1, D, r2, N, act, fp16, parts, rows_scale, squares, reach, scale1, bias1, scale2, bias2,
// scale3, bias3, residual, sums, flags, ctas, device, stream): addresses of contiguous matrices of bytes, of vectors in fp32,
// and of y and residual in bf16 or fp16; biases and residual may be 0. sums and flags (zeros) are as large as
// fp8_mlp_sm90_room(M, r1, D, r2, N, ctas, device) says: (CTAs, fp32 numbers of each). ctas: CTAs at most, 0 for as many as
// there are processors.
#include <pybind11/pybind11.h>

#include "cuda/fp8_mlp_tile.h"
#include "cuda/status.h"

namespace py = pybind11;
using namespace vitlr::cuda;
using namespace vitlr::cuda::fp8_mlp;

namespace {

constexpr const char* kName = "the MLP of 8-bit floats for Hopper";

// What TMA asks of matrices, and loads of vectors four numbers at a time.
void require(const Matrices& p, const Sizes& sizes, int device) {
  require_capability(device, 90, true, kName);
  require_on_device(
      {
          {p.q, "q", 16, false},
          {p.W1, "W1", 16, false},
          {p.W2, "W2", 16, false},
          {p.W3, "W3", 16, false},
          {sizes.y, "y", 16, false},
          {sizes.residual, "the residual", 16, true},
          {sizes.rows_scale, "the rows' scale", 4, false},
          {sizes.squares, "the rows' squares", 4, false},
          {sizes.reach, "reach", 4, false},
          {sizes.scale1, "scale1", 16, false},
          {sizes.scale2, "scale2", 16, false},
          {sizes.scale3, "scale3", 16, false},
          {sizes.bias1, "bias1", 16, true},
          {sizes.bias2, "bias2", 16, true},
          {sizes.bias3, "bias3", 16, true},
          {sizes.sums, "the room for sums", 16, false},
          {sizes.flags, "the flags", 4, false},
      },
      device);
  if (sizes.act < Act::none || sizes.act > Act::relu) refuse("no such activation");
  const std::string why = objection(sizes);
  if (!why.empty()) refuse(why);
}

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

int processors(int ctas, int device) {
  return ctas > 0 ? ctas : attribute(cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

void register_fp8_mlp_sm90(py::module_& m) {
  m.def("fp8_mlp_sm90_room", [](int M, int r1, int D, int r2, int N, int ctas, int device) {
    Sizes sizes{};
    sizes.M = M, sizes.r1 = r1, sizes.D = D, sizes.r2 = r2, sizes.N = N, sizes.parts = 1;
    const std::string why = objection(sizes);
    if (!why.empty()) refuse(why);
    const Room room = room_of(sizes, processors(ctas, device));
    return py::make_tuple(room.ctas, room.each);
  });
  m.def("fp8_mlp_sm90", [](uintptr_t q, uintptr_t W1, uintptr_t W2, uintptr_t W3, uintptr_t y, int M, int r1, int D, int r2,
                           int N, int act, bool fp16, int parts, uintptr_t rows_scale, uintptr_t squares, uintptr_t reach,
                           uintptr_t scale1, uintptr_t bias1, uintptr_t scale2, uintptr_t bias2, uintptr_t scale3,
                           uintptr_t bias3, uintptr_t residual, uintptr_t sums, uintptr_t flags, int ctas, int device,
                           uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto matrix = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
    const Matrices matrices{matrix(q), matrix(W1), matrix(W2), matrix(W3)};
    const Sizes sizes{M, r1, D, r2, N, static_cast<Act>(act), fp16, parts,
                      floats(rows_scale), floats(squares), floats(reach),
                      floats(scale1), floats(bias1), floats(scale2), floats(bias2), floats(scale3), floats(bias3),
                      matrix(residual), reinterpret_cast<void*>(y),
                      reinterpret_cast<float*>(sums), reinterpret_cast<int*>(flags)};
    require(matrices, sizes, device);
    launch_mlp(matrices, sizes, processors(ctas, device), reinterpret_cast<void*>(stream));
  });
}
