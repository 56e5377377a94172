// Rows of floats to bytes and their first linear for Hopper: fp8_first_body.h.
#include "cuda/fp8_first_body.h"
#include "cuda/fp8_hopper.h"
#include "cuda/lowrank_kernel.h"

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
  // TMA moves what it takes for 16-bit numbers, as bits.
  const auto encode = [](const void* data, int rows, int pairs, int box_rows, int box_pairs) {
    return lowrank::encoded(lowrank::Matrix{data, pairs}, rows, pairs, box_rows, box_pairs, true);
  };
  const auto maps = maps_of<T, CUtensorMap>(matrices, sizes, encode);
  auto* kernel = &fp8_first_kernel<T, Type>;
  const size_t bytes = T::shared_bytes + 1024;
  allow_shared(kernel, bytes, "shared memory of the first linear of 8-bit floats");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas<T>(sizes, processors)));
  config.blockDim = dim3(T::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
#ifdef VITLR_BOUNDED_WAITS
  lowrank::Hang* const note = lowrank::allocated_hang();
  check(cudaMemcpyToSymbol(lowrank::hang_note, &note, sizeof note), "the note of the debug build");
#endif
  check(cudaLaunchKernelEx(&config, kernel, maps, sizes), "launch of the first linear of 8-bit floats");
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
