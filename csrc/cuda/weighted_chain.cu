// Batched products in fp64 on tensor cores; the algorithm is in chain_tiles.h and chain_product.h.
#include "cuda/weighted_chain.h"

#include "cuda/status.h"

namespace vitlr::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(T::THREADS) product_kernel(const __grid_constant__ Product p) {
  extern __shared__ double shared[];
  DeviceBlock block;
  product_block<T>(block, p, blockIdx.x, shared);
}

template <class T>
void launch(const Product& p, cudaStream_t stream) {
  const int64_t blocks = tile_count<T>(p) * p.batch;
  if (blocks > INT32_MAX) refuse("the batch has more tiles than a launch has blocks; solve smaller batches");
  constexpr size_t bytes = T::SHARED * sizeof(double);
  allow_shared(product_kernel<T>, bytes, "weighted_chain: shared memory");
  product_kernel<T><<<static_cast<unsigned>(blocks), T::THREADS, bytes, stream>>>(p);
  check_launch("weighted_chain");
}

}  // namespace

void launch_weighted_chain(const Product& p, int device, cudaStream_t stream) {
  require_capability(device, 80, false, "weighted_chain");
  if (p.symmetric && p.M != p.N) refuse("a symmetric result has as many rows as columns");
  if (p.batch == 0 || p.M == 0 || p.N == 0) return;
  require_on_device(p.out.at, device, sizeof(double), "out");
  if (p.K != 0) {
    require_on_device(p.X.at, device, sizeof(double), "X");
    require_on_device(p.Y.at, device, sizeof(double), "Y");
  }
  const bool fits = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) >= int(Wide::SHARED * sizeof(double));
  if (fits && prefers_wide(p, attribute(cudaDevAttrMultiProcessorCount, device)))
    launch<Wide>(p, stream);
  else
    launch<Narrow>(p, stream);
}

}  // namespace vitlr::cuda
