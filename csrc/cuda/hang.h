// Where the debug build's kernels leave their note (bounded_wait.h): memory of the host, which outlives the context.
#pragma once
#include "cuda/bounded_wait.h"
#include "cuda/status.h"

namespace vitlr::cuda::lowrank {

inline Hang* hang_of_this_process() {
  static Hang* const note = [] {
    void* made = nullptr;
    check(cudaHostAlloc(&made, sizeof(Hang), cudaHostAllocPortable), "the note of the debug build");
    return new (made) Hang{};
  }();
  return note;
}

}  // namespace vitlr::cuda::lowrank
