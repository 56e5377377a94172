// Rows of floats to bytes and their first linear for Hopper: fp8_first_body.h.
#include "cuda/fp8_first_body.h"
#include "cuda/fp8_hopper.h"
#include "cuda/fp8_launch.h"

namespace vitlr::cuda::fp8_first {
namespace {

using Policy = lowrank::Fp8Hopper;

template <class T, class Type>
__global__ void __launch_bounds__(T::threads, 1)
    fp8_first_kernel(const __grid_constant__ Maps<CUtensorMap> maps, const __grid_constant__ Sizes sizes) {
  Policy p(lowrank::aligned_shared());
  if (threadIdx.x == 0) fp8_first::initialise<T>(p);
  p.start();
  if (threadIdx.x == 0) fp8_first::produce<T>(p, sizes, maps);
  __syncwarp();
  Consumer<T, Type, Policy>(p, sizes, maps, p.warpgroup() + 1).run();  // no warpgroup of producers comes first
}

template <class T, class Type>
void launch(const Matrices& matrices, const Sizes& sizes, int processors, cudaStream_t stream) {
  const auto maps = maps_of<T, CUtensorMap>(matrices, sizes, fp8::encoded_pairs);
  fp8::launch<T>(&fp8_first_kernel<T, Type>, ctas<T>(sizes, processors), stream, "the first linear of 8-bit floats", maps, sizes);
}

}  // namespace

void launch_first(const Matrices& matrices, const Sizes& sizes, int processors, void* stream) {
  with_tile(sizes.r, [&](auto tile) {
    const auto queue = static_cast<cudaStream_t>(stream);
    if (sizes.fp16)
      launch<decltype(tile), lowrank::Fp16>(matrices, sizes, processors, queue);
    else
      launch<decltype(tile), lowrank::Bf16>(matrices, sizes, processors, queue);
  });
}

}  // namespace vitlr::cuda::fp8_first
