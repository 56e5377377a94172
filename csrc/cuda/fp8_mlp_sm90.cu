// An MLP of 8-bit floats for Hopper behind its first linear: fp8_mlp_body.h.
#include "cuda/fp8_hopper.h"
#include "cuda/fp8_mlp_body.h"
#include "cuda/lowrank_kernel.h"

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
  // TMA moves what it takes for 16-bit numbers, as bits.
  const auto encode = [](const void* data, int rows, int pairs, int box_rows) {
    return lowrank::encoded(lowrank::Matrix{data, pairs}, rows, pairs, box_rows, kPanelColumns, true);
  };
  const auto maps = maps_of<T, CUtensorMap>(matrices, sizes, encode, lowrank::woven_map);
  auto* kernel = &fp8_mlp_kernel<T>;
  const size_t bytes = T::shared_bytes + 1024;
  allow_shared(kernel, bytes, "shared memory of the MLP of 8-bit floats");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas<T>(sizes, processors)));
  config.blockDim = dim3(T::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
#ifdef VITLR_BOUNDED_WAITS
  lowrank::Hang* const note = lowrank::allocated_hang();
  check(cudaMemcpyToSymbol(lowrank::hang_note, &note, sizeof note), "the note of the debug build");
#endif
  check(cudaLaunchKernelEx(&config, kernel, maps, sizes), "launch of the MLP of 8-bit floats");
}

}  // namespace

void launch_mlp(const Matrices& matrices, const Sizes& sizes, int processors, void* stream) {
  with_tile(sizes.r1, sizes.r2, [&](auto tile) {
    launch<decltype(tile)>(matrices, sizes, processors, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vitlr::cuda::fp8_mlp
