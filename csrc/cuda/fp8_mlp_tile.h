// Sizes, shared memory and share of the work of a CTA of fp8_mlp_body.h: an MLP of 8-bit floats behind its first linear.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/fp8_tile.h"

namespace vitlr::cuda::fp8_mlp {

using fp8::kDepth;
using fp8::kPanelBytes;
using lowrank::Act;
using lowrank::kPanelColumns;
using lowrank::kSharedMemory;
using lowrank::kWarpgroup;
using lowrank::kWarpgroupRows;
using lowrank::panel_bytes;

constexpr int kSlice = 128;    // hidden columns of a unit of work
constexpr int kColumns = 128;  // of a tile of y
constexpr int kFewest = 4;     // units a CTA, so that few rows are not shared by all of them

// y [M, N] = s₂ (scale₃ ⊙ (W₃ q₂)) + b₃ + residual, q₂ = e4m3(p / s₂), p = s (scale₂ ⊙ (W₂ h)) + b₂,
// h = e4m3(act(rows_scale (scale₁ ⊙ (W₁ q)) + b₁) / s). All contiguous.
struct Sizes {
  int M, r1, D, r2, N;
  Act act;
  int fp16;                 // y and residual: fp16, else bf16
  int parts;                // sums of squares that each row of q comes with
  const float* rows_scale;  // [M]
  const float* squares;     // [M, parts]
  const float* reach;       // [2] of W₁
  const float *scale1, *bias1;  // [D]; biases may be null
  const float *scale2, *bias2;  // [r2]
  const float *scale3, *bias3;  // [N]
  const void* residual;         // [M, N] or null
  void* y;                      // [M, N]
  float* sums;                  // [CTAs, 128, R]: what is left for whoever began the row block
  int* flags;                   // [CTAs, 2]: 0 before
};

// The matrices that TMA moves. Map is CUtensorMap, or what the emulation takes for one.
template <class Map>
struct Maps {
  Map q, W1, W2, W3;
};

// Two warpgroups of 64 rows for ranks up to R.
template <int R_>
struct Tile {
  static constexpr int R = R_, WARPGROUPS = 2;
  static constexpr int rows = WARPGROUPS * kWarpgroupRows;
  static constexpr int threads = (1 + WARPGROUPS) * kWarpgroup;
  static constexpr int panels = (R + kPanelBytes - 1) / kPanelBytes;
  static constexpr int depth = R / kDepth;  // products over r₁ and r₂

  static constexpr int panel = panel_bytes(kSlice);  // of rows of q, a slice of W₁, a tile of W₃
  static constexpr int values_bytes = R * kPanelBytes;  // a slice of W₂
  static constexpr int keys_bytes = panels * panel;
  static constexpr int slot_bytes = keys_bytes > values_bytes ? keys_bytes : values_bytes;
  static constexpr int barrier_bytes = 1024;
  static constexpr int held_bytes = panels * panel;
  static constexpr int room = kSharedMemory - 1024 - barrier_bytes - held_bytes;
  static constexpr int slots = room / slot_bytes < lowrank::kMostSlots ? room / slot_bytes : lowrank::kMostSlots;
  static constexpr int shared_bytes = barrier_bytes + held_bytes + slots * slot_bytes;

  static constexpr int producer_registers = 24, consumer_registers = 240;

  // Offsets in shared memory; barriers lie where the debug build knows them.
  using Barriers = lowrank::Tile<64, 3>;
  VITLR_HD static constexpr int full(int i) { return Barriers::full(i); }
  VITLR_HD static constexpr int empty(int i) { return Barriers::empty(i); }
  static constexpr int ready = Barriers::ready;  // rows of q have come
  static constexpr int taken = Barriers::taken;  // nobody multiplies them any more
  VITLR_HD static constexpr int left(int w) { return Barriers::incoming(w); }  // no barrier: what a flag is called
  static constexpr int held = barrier_bytes;
  static constexpr int ring = held + held_bytes;
  VITLR_HD static constexpr int held_panel(int k, int w) {
    return held + k * panel + w * panel_bytes(kWarpgroupRows);
  }
  VITLR_HD static constexpr int slot(int i) { return ring + i * slot_bytes; }
  // The i-th step of depth in panels side by side.
  VITLR_HD static constexpr int depth_at(int i) { return i * kDepth / kPanelBytes * panel + i * kDepth % kPanelBytes; }

  static_assert(rows == kSlice && kColumns == kSlice, "all of them are panels of 128 rows");
  static_assert(R % kDepth == 0 && R <= 256 && values_bytes % 1024 == 0);
  static_assert(slots >= 3 && shared_bytes + 1024 <= kSharedMemory);
  static_assert(producer_registers + WARPGROUPS * consumer_registers <= (1 + WARPGROUPS) * (65536 / threads / 8 * 8));
};

constexpr int kLargest = 256;  // rank: one of 288 would spill, a row block's sums beside a slice of the hidden

// The tiles that are compiled: f(Tile<R>{}) of the least that holds both ranks.
template <class F>
void with_tile(int r1, int r2, F f) {
  const int r = std::max(r1, r2);
  if (r <= 192)
    f(Tile<192>{});
  else if (r <= 224)
    f(Tile<224>{});
  else
    f(Tile<256>{});
}

VITLR_HD constexpr int slices(const Sizes& sizes) { return ceil_div(sizes.D, kSlice); }

// Row blocks one after the other, slices of the hidden within.
template <class T>
VITLR_HD constexpr int units(const Sizes& sizes) {
  return ceil_div(sizes.M, T::rows) * slices(sizes);
}

// CTAs of a launch, at most one a processor.
template <class T>
int ctas(const Sizes& sizes, int processors) {
  return std::min(processors, ceil_div(units<T>(sizes), kFewest));
}

// The contiguous share of a place in the order of units. CTAs take places from the last on: who adds up waits for later
// places only, so for CTAs that were started before it.
template <class Policy>
VITLR_HD int place_of(const Policy& p) {
  return p.clusters() - 1 - p.cluster();
}

// What a CTA does of one row block.
struct Segment {
  int block, begin, end;  // slices
};

VITLR_HD constexpr Segment segment_of(int unit, int end, int slices) {
  const int block = unit / slices, begin = unit % slices, last = begin + end - unit;
  return {block, begin, last < slices ? last : slices};
}

// Pointers to bytes.
struct Matrices {
  const void* q;   // [M, r1]
  const void* W1;  // [D, r1]
  const void* W2;  // [r2, D]
  const void* W3;  // [N, r2]
};

// encode(address, rows, columns in pairs of bytes, box rows) -> Map of boxes 64 pairs wide; `weave` likewise with rows in the
// order of `woven` (tiles.h).
template <class T, class Map, class Encode, class Weave>
Maps<Map> maps_of(const Matrices& p, const Sizes& sizes, Encode encode, Weave weave) {
  return {encode(p.q, sizes.M, sizes.r1 / 2, T::rows), weave(p.W1, sizes.D, sizes.r1 / 2, kSlice),
          weave(p.W2, sizes.r2, sizes.D / 2, T::R), weave(p.W3, sizes.N, sizes.r2 / 2, kColumns)};
}

// Why a shape does not run; empty where it does.
inline std::string objection(const Sizes& sizes) {
  if (sizes.M < 1 || sizes.M > 1 << 30) return "M = " + std::to_string(sizes.M) + ", expected 1 to 2^30";
  for (const auto& [value, name] : {std::pair<int, const char*>{sizes.r1, "r1"}, {sizes.D, "D"}, {sizes.r2, "r2"}, {sizes.N, "N"}})
    if (value < 16 || value % 16) return name + (" = " + std::to_string(value)) + ", expected a multiple of 16";
  if (std::max(sizes.r1, sizes.r2) > kLargest)
    return "ranks " + std::to_string(sizes.r1) + " and " + std::to_string(sizes.r2) + ", expected at most " +
           std::to_string(kLargest) + ": sums are held in registers";
  if (sizes.parts < 1) return "no sums of squares of rows";
  return "";
}

// CTAs, and numbers of a CTA in `sums`.
struct Room {
  int ctas, each;
};

inline Room room_of(const Sizes& sizes, int processors) {
  Room room{};
  with_tile(sizes.r1, sizes.r2, [&](auto tile) {
    using T = decltype(tile);
    room = {ctas<T>(sizes, processors), T::rows * T::R};
  });
  return room;
}

void launch_mlp(const Matrices&, const Sizes&, int processors, void* stream);

}  // namespace vitlr::cuda::fp8_mlp
