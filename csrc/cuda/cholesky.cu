// Batched blocked Cholesky and back substitution in fp64; the algorithm is in cholesky_tiles.h.
#include "cuda/cholesky.h"

#include "cuda/status.h"

namespace vitlr::cuda {
namespace {

constexpr size_t kBytes = kCholeskyShared * sizeof(double);

__global__ void __launch_bounds__(Narrow::THREADS, 1) factor_kernel(const __grid_constant__ Cholesky p, int64_t panel) {
  extern __shared__ double shared[];
  DeviceBlock block;
  factor_block(block, p, panel, blockIdx.x, shared);
}

__global__ void __launch_bounds__(Narrow::THREADS) substitution_kernel(const __grid_constant__ Substitution p) {
  extern __shared__ double shared[];
  DeviceBlock block;
  substitution_block(block, p, blockIdx.x, shared);
}

void substitute(const Substitution& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.M, Narrow::BM) * p.batch;
  if (blocks > INT32_MAX) refuse("the batch has more tiles than a launch has blocks; solve smaller batches");
  substitution_kernel<<<static_cast<unsigned>(blocks), Narrow::THREADS, kBytes, stream>>>(p);
  check_launch("substitution");
}

}  // namespace

void launch_cholesky(const Cholesky& p, int device, cudaStream_t stream) {
  require_capability(device, 80, false, "cholesky");
  if (p.batch == 0 || p.n == 0) return;
  if (p.batch > INT32_MAX || p.n > INT32_MAX - 1) refuse("the batch is too large; solve smaller batches");
  require_on_device(p.F.at, device, sizeof(double), "F");
  require_on_device(p.L.at, device, sizeof(double), "L");
  require_on_device(p.inverse, device, sizeof(double), "inverse");
  require_on_device(p.shift, device, sizeof(double), "shift");
  require_on_device(p.info, device, sizeof(int32_t), "info");
  allow_shared(factor_kernel, kBytes, "cholesky: shared memory");
  allow_shared(substitution_kernel, kBytes, "cholesky: shared memory");
  for (int64_t panel = 0; panel < panels(p.n); ++panel) {
    factor_kernel<<<static_cast<unsigned>(p.batch), Narrow::THREADS, kBytes, stream>>>(p, panel);
    check_launch("cholesky");
    if (panel + 1 < panels(p.n)) substitute(below(p, panel), stream);
  }
}

void launch_back_substitution(const BackSubstitution& p, int device, cudaStream_t stream) {
  require_capability(device, 80, false, "back_substitution");
  if (p.batch == 0 || p.n == 0 || p.columns == 0) return;
  require_on_device(p.L.at, device, sizeof(double), "L");
  require_on_device(p.U.at, device, sizeof(double), "U");
  require_on_device(p.P.at, device, sizeof(double), "P");
  require_on_device(p.inverse, device, sizeof(double), "inverse");
  allow_shared(substitution_kernel, kBytes, "back_substitution: shared memory");
  for (int64_t panel = panels(p.n) - 1; panel >= 0; --panel) substitute(back(p, panel), stream);
}

}  // namespace vitlr::cuda
