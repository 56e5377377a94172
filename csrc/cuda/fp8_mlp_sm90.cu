// An MLP of 8-bit floats for Hopper behind its first linear: fp8_mlp_body.h.
#include "cuda/fp8_hopper.h"
#include "cuda/fp8_launch.h"
#include "cuda/fp8_mlp_body.h"

namespace vitlr::cuda::fp8_mlp {
namespace {

using Policy = lowrank::Fp8Hopper;

template <class T>
__global__ void __launch_bounds__(T::threads, 1)
    fp8_mlp_kernel(const __grid_constant__ Maps<CUtensorMap> maps, const __grid_constant__ Sizes sizes) {
  Policy p(lowrank::aligned_shared());
  if (threadIdx.x == 0) fp8_mlp::initialise<T>(p);
  p.start();
  if (threadIdx.x < kWarpgroup) {
    lowrank::fewer_registers<T::producer_registers>();
    if (threadIdx.x == 0) fp8_mlp::produce<T>(p, sizes, maps);
  } else {
    lowrank::more_registers<T::consumer_registers>();
    Consumer<T, Policy>(p, sizes).run();
  }
}

template <class T>
void launch(const Matrices& matrices, const Sizes& sizes, int processors, cudaStream_t stream) {
  const auto encode = [](const void* data, int rows, int pairs, int box_rows) {
    return fp8::encoded_pairs(data, rows, pairs, box_rows, kPanelColumns);
  };
  const auto maps = maps_of<T, CUtensorMap>(matrices, sizes, encode, lowrank::woven_map);
  fp8::launch<T>(&fp8_mlp_kernel<T>, ctas<T>(sizes, processors), stream, "the MLP of 8-bit floats", maps, sizes);
}

}  // namespace

void launch_mlp(const Matrices& matrices, const Sizes& sizes, int processors, void* stream) {
  with_tile(sizes.r1, sizes.r2, [&](auto tile) {
    launch<decltype(tile)>(matrices, sizes, processors, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vitlr::cuda::fp8_mlp
