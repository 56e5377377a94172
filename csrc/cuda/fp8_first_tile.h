// Sizes, shared memory and share of the work of a CTA of fp8_first_body.h: rows of floats to bytes, their first linear.
#pragma once
#include <algorithm>
#include <string>

#include "cuda/fp8_tile.h"

namespace vitlr::cuda::fp8_first {

using fp8::kDepth;
using fp8::kPanelBytes;
using lowrank::kPanelColumns;
using lowrank::kSharedMemory;
using lowrank::kWarpgroup;
using lowrank::kWarpgroupRows;
using lowrank::panel_bytes;

constexpr int kWidest = 768;          // columns of x: W is held whole
constexpr int kEight = 8;             // columns of x that a lane loads at once, 16 bytes
constexpr int kPart = 32 * kEight;    // ... and a warp
constexpr int kParts = kWidest / kPart;

// y [M, r] = e4m3(p / s₁), p = s (scale ⊙ (W q)) + b, q = e4m3(x' / s), x' = x or its LayerNorm. All contiguous.
struct Sizes {
  int M, K, r;
  int fp16;                   // x, gamma, beta: fp16, else bf16
  const void* x;              // [M, K]
  const void *gamma, *beta;   // [K], or both null: no norm
  float eps;
  const float *scale, *bias;  // [r]; bias may be null
  const float* reach;         // [2] of W
  float* y_scale;             // [M]: s₁
  float* y_squares;           // [M]: Σ p² of a row
  int* flags;                 // of the launch behind this one, made zero; may be null
  int count;                  // ... so many
};

// The matrices that TMA moves. Map is CUtensorMap, or what the emulation takes for one.
template <class Map>
struct Maps {
  Map W, y;
};

// Four warpgroups share N rows of x at a time and 64 rows each of W, ranks up to R. They take no turns, so named barriers 1
// to 4 are theirs.
template <int N_, int R_>
struct Tile {
  static constexpr int N = N_, R = R_, WARPGROUPS = 4, warps = 4 * WARPGROUPS;
  static constexpr int threads = WARPGROUPS * kWarpgroup;
  static constexpr int each = N / warps;  // rows of x of a warp
  static constexpr int panels = kWidest / kPanelBytes;

  static constexpr int barrier_bytes = 1024;
  static constexpr int total_bytes = 2 * WARPGROUPS * N * 4;
  static constexpr int W_panel = panel_bytes(R), q_panel = panel_bytes(N);
  static constexpr int stage_bytes = N * kWarpgroupRows;

  // Offsets in shared memory; barriers lie where the debug build knows them.
  using Barriers = lowrank::Tile<64, 3>;
  VITLR_HD static constexpr int full(int k) { return Barriers::full(k); }  // the k-th panel of W has come
  static constexpr int ready = Barriers::ready;                           // so have rows of q
  // ... and parts of sums of squares: two barriers, as who is early is at the next group's before all are at this one's.
  VITLR_HD static constexpr int summed(int n) { return n % 2 ? Barriers::incoming(0) : Barriers::taken; }
  static constexpr int fact_bytes = 8 * N;
  VITLR_HD static constexpr int fact(int n, int row) { return 256 + n % 3 * fact_bytes + 8 * row; }
  static constexpr int W = barrier_bytes + (total_bytes + 1023) / 1024 * 1024;
  VITLR_HD static constexpr int total(int n, int w, int row) {
    return barrier_bytes + ((n % 2 * WARPGROUPS + w) * N + row) * 4;
  }
  static constexpr int rows = W + panels * W_panel;
  VITLR_HD static constexpr int q(int n) { return rows + n % 2 * panels * q_panel; }
  static constexpr int stages = rows + 2 * panels * q_panel;
  VITLR_HD static constexpr int stage(int w) { return stages + w * stage_bytes; }
  static constexpr int shared_bytes = stages + WARPGROUPS * stage_bytes;

  // The first row of W of a warpgroup: the last one's end at R, and begin with some that are another one's.
  VITLR_HD static constexpr int first(int w) {
    return kWarpgroupRows * w < R - kWarpgroupRows ? kWarpgroupRows * w : R - kWarpgroupRows;
  }

  static_assert(N % warps == 0 && 256 + 3 * fact_bytes <= barrier_bytes);
  static_assert(R % 16 == 0 && R >= kWarpgroupRows && R > kWarpgroupRows * (WARPGROUPS - 1));
  static_assert(16 * N <= stage_bytes && stage_bytes % 1024 == 0 && q_panel % 1024 == 0 && W_panel % 1024 == 0);
  static_assert(shared_bytes + 1024 <= kSharedMemory);
};

constexpr int kLargest = 256;  // rank: of what fp8_mlp_body.h takes, and of what shared memory holds

// The tiles that are compiled: f(Tile<N, R>{}) of the least that holds the rank.
template <class F>
void with_tile(int r, F f) {
  if (r <= 224)
    f(Tile<32, 224>{});
  else
    f(Tile<16, 256>{});
}

// Of N rows of x.
template <class T>
VITLR_HD constexpr int groups(const Sizes& sizes) {
  return ceil_div(sizes.M, T::N);
}

template <class T>
int ctas(const Sizes& sizes, int processors) {
  return std::min(processors, groups<T>(sizes));
}

// Pointers to bytes.
struct Matrices {
  const void* W;  // [r, K]
  void* y;        // [M, r]
};

// encode(address, rows, columns in pairs of bytes, box rows, box columns) -> Map.
template <class T, class Map, class Encode>
Maps<Map> maps_of(const Matrices& p, const Sizes& sizes, Encode encode) {
  return {encode(p.W, sizes.r, sizes.K / 2, T::R, kPanelColumns),
          encode(p.y, sizes.M, sizes.r / 2, T::N, kWarpgroupRows / 2)};
}

// Why a shape does not run; empty where it does.
inline std::string objection(const Sizes& sizes) {
  if (sizes.M < 1 || sizes.M > 1 << 30) return "M = " + std::to_string(sizes.M) + ", expected 1 to 2^30";
  if (sizes.K < 16 || sizes.K % 16 || sizes.K > kWidest)
    return "K = " + std::to_string(sizes.K) + ", expected a multiple of 16 up to " + std::to_string(kWidest);
  if (sizes.r < 16 || sizes.r % 16 || sizes.r > kLargest)
    return "r = " + std::to_string(sizes.r) + ", expected a multiple of 16 up to " + std::to_string(kLargest);
  if ((sizes.gamma == nullptr) != (sizes.beta == nullptr)) return "gamma without beta, or beta without gamma";
  return "";
}

void launch_first(const Matrices&, const Sizes&, int processors, void* stream);

}  // namespace vitlr::cuda::fp8_first
