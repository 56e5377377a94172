// lowrank_linear for few rows on Hopper, K shared by the CTAs of a cluster: lowrank_body.h.
#include "cuda/lowrank_kernel.h"

namespace vitlr::cuda::lowrank {

void launch_linear(const LowrankParams& p, const Plan& plan, void* stream) {
  if (p.fp16)
    launch<false, Fp16>(p, plan, static_cast<cudaStream_t>(stream));
  else
    launch<false, Bf16>(p, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace vitlr::cuda::lowrank
