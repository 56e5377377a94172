// Where the debug build's kernels leave their note (bounded_wait.h): memory of the host, which outlives the context.
#pragma once
#include <new>

#include "cuda/bounded_wait.h"
#include "cuda/status.h"

namespace vitlr::cuda::lowrank {

// The note of this process; none before the first launch.
inline Hang*& hang_of_this_process() {
  static Hang* note = nullptr;
  return note;
}

inline Hang* allocated_hang() {
  Hang*& note = hang_of_this_process();
  if (note == nullptr) {
    void* made = nullptr;
    check(cudaHostAlloc(&made, sizeof(Hang), cudaHostAllocPortable), "the note of the debug build");
    note = new (made) Hang{};
  }
  return note;
}

}  // namespace vitlr::cuda::lowrank
