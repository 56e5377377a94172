// A linear of 8-bit floats for Hopper, bytes in and out: fp8_body.h.
#include "cuda/fp8_body.h"
#include "cuda/fp8_hopper.h"
#include "cuda/fp8_launch.h"

namespace vitlr::cuda::fp8 {
namespace {

using Policy = lowrank::Fp8Hopper;

template <class T>
__global__ void __launch_bounds__(T::threads, 1)
    fp8_kernel(const __grid_constant__ Maps<CUtensorMap> maps, const __grid_constant__ Sizes sizes) {
  Policy p(lowrank::aligned_shared());
  if (threadIdx.x == 0) fp8::initialise<T>(p);
  p.start();
  if (threadIdx.x < kWarpgroup) {
    lowrank::fewer_registers<T::producer_registers>();
    if (threadIdx.x == 0) fp8::produce<T>(p, sizes, maps);
  } else {
    lowrank::more_registers<T::consumer_registers>();
    Consumer<T, Policy>(p, sizes, maps).run();
  }
}

template <class T>
void launch(const Matrices& matrices, const Sizes& sizes, int ctas, cudaStream_t stream) {
  const auto maps = maps_of<T, CUtensorMap>(matrices, sizes, fp8::encoded_pairs);
  fp8::launch<T>(&fp8_kernel<T>, std::min(ctas, tiles<T>(sizes)), stream, "the kernel of 8-bit floats", maps, sizes);
}

}  // namespace

void launch_linear(const Matrices& matrices, const Sizes& sizes, int ctas, void* stream) {
  with_tile(sizes.K, [&](auto tile) {
    launch<decltype(tile)>(matrices, sizes, ctas, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vitlr::cuda::fp8
