// The low-rank MLP for Hopper in fp16: lowrank_body.h.
#include "cuda/lowrank_kernel.h"

namespace vitlr::cuda::lowrank {

void launch_mlp_fp16(const LowrankParams& p, const Plan& plan, void* stream) {
  launch<true, Fp16>(p, plan, static_cast<cudaStream_t>(stream));
}

}  // namespace vitlr::cuda::lowrank
