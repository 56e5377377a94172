// What the debug build (-DVITLR_BOUNDED_WAITS) does in place of waiting for ever: it gives up and leaves a note of who
// waited for what, then traps. A trap ends the context, so the note lies in memory of the host; printf would be a call,
// for which ptxas takes setmaxnreg out, and another kernel would run than the one that hangs.
#pragma once
#include <cstdint>
#include <string>

#include "cuda/lowrank_tile.h"

namespace vitlr::cuda::lowrank {

constexpr uint64_t kPatience = 2'000'000'000;  // ns: a thousand times the longest kernel

// A barrier by its offset in shared memory: `full 3` is that of the ring's fourth slot.
struct BarrierName {
  const char* kind;
  int index;
};

VITLR_HD constexpr BarrierName barrier_name(int offset) {
  using T = Tile<64, 3>;  // offsets are the same in every tile
  for (int i = 0; i < kMostSlots; ++i) {
    if (offset == T::full(i)) return {"full", i};
    if (offset == T::empty(i)) return {"empty", i};
  }
  for (int w = 0; w < 3; ++w) {
    if (offset == T::incoming(w)) return {"incoming", w};
    if (offset == T::gathered(w)) return {"gathered", w};
  }
  return {offset == T::ready ? "ready" : offset == T::taken ? "taken" : "unknown", 0};
}

// Whether `passed()` became true within `patience` of the clock `now()`.
template <class Passed, class Now>
VITLR_HD bool passes_in_time(Passed passed, Now now, uint64_t patience = kPatience) {
  const uint64_t start = now();
  while (!passed())
    if (now() - start > patience) return passed();  // once more: this thread may not have run for all that time
  return true;
}

// The note.
struct Hang {
  int there, block, warp, barrier, parity;
};

// In words; empty where nothing hung.
inline std::string told(const Hang& hang) {
  if (!hang.there) return "";
  const BarrierName name = barrier_name(hang.barrier);
  return "block " + std::to_string(hang.block) + ", warp " + std::to_string(hang.warp) + ", barrier " + name.kind + " " +
         std::to_string(name.index) + ", parity " + std::to_string(hang.parity);
}

}  // namespace vitlr::cuda::lowrank
