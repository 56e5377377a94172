// Sizes, shared memory and share of the work of a CTA of fp8_body.h: one linear of 8-bit floats, bytes in and out.
#pragma once
#include <string>

#include "cuda/lowrank_tile.h"

namespace vitlr::cuda::fp8 {

using lowrank::Act;
using lowrank::kPanelColumns;
using lowrank::kSharedMemory;
using lowrank::kWarpgroup;
using lowrank::kWarpgroupRows;
using lowrank::panel_bytes;

constexpr int kDepth = 32;         // of one wgmma of bytes: 32 bytes a row, as of 16-bit values
constexpr int kPanelBytes = 128;   // columns of a panel: TMA moves bytes in pairs, of which a panel has kPanelColumns
constexpr int kTileColumns = 128;  // of a tile of y

// y [M, N] = e4m3(act(rows_scale (scale ⊙ (W q)) + b) / s), all matrices of bytes and contiguous.
struct Sizes {
  int M, K, N;
  Act act;
  int parts;                 // sums of squares that each row of q comes with
  const float* rows_scale;   // [M]
  const float* squares;      // [M, parts]
  const float* scale;        // [N]
  const float* bias;         // [N] or null
  const float* reach;        // [2]: ‖act(p)‖∞ of a row <= ‖row‖ reach₀ + reach₁
  float* y_scale;            // [M]: s
  float* y_squares;          // [M, ⌈N / 128⌉]
};

// The matrices that TMA moves; Map is CUtensorMap, or what the emulation takes for one.
template <class Map>
struct Maps {
  Map q, W, y;
};

// A CTA holds 192 rows of q whole, up to PANELS panels of 128 bytes, while tiles of W pass by: three warpgroups own 64 rows
// each, so that one activates while others multiply. LAST: steps of 32 of the last panel that hold anything, so that a
// rank of 224 multiplies 224 columns.
template <int PANELS, int LAST>
struct Tile {
  static constexpr int most_panels = PANELS, last = LAST;
  static constexpr int WARPGROUPS = 3;
  static constexpr int rows = WARPGROUPS * kWarpgroupRows;
  static constexpr int threads = (1 + WARPGROUPS) * kWarpgroup;

  static constexpr int slot_bytes = panel_bytes(kTileColumns);
  static constexpr int rows_bytes = PANELS * panel_bytes(rows);
  static constexpr int stage_bytes = panel_bytes(kWarpgroupRows);
  static constexpr int barrier_bytes = 1024;
  static constexpr int room = kSharedMemory - 1024 - barrier_bytes - rows_bytes - WARPGROUPS * stage_bytes;
  static constexpr int slots = room / slot_bytes < lowrank::kMostSlots ? room / slot_bytes : lowrank::kMostSlots;
  static constexpr int shared_bytes = barrier_bytes + rows_bytes + WARPGROUPS * stage_bytes + slots * slot_bytes;

  static constexpr int producer_registers = 32, consumer_registers = 160;

  // Offsets in shared memory. Barriers lie where those of the low-rank kernels do, so that the debug build names them.
  using Barriers = lowrank::Tile<64, 3>;
  VITLR_HD static constexpr int full(int i) { return Barriers::full(i); }
  VITLR_HD static constexpr int empty(int i) { return Barriers::empty(i); }
  static constexpr int ready = Barriers::ready;  // rows of q have come
  static constexpr int taken = Barriers::taken;  // nobody multiplies them any more
  static constexpr int held = barrier_bytes;
  static constexpr int stages = held + rows_bytes;
  static constexpr int ring = stages + WARPGROUPS * stage_bytes;
  VITLR_HD static constexpr int held_panel(int k, int w) {
    return held + k * panel_bytes(rows) + w * panel_bytes(kWarpgroupRows);
  }
  VITLR_HD static constexpr int stage(int w) { return stages + w * stage_bytes; }
  VITLR_HD static constexpr int slot(int i) { return ring + i * slot_bytes; }

  static_assert(slots >= 3 && shared_bytes + 1024 <= kSharedMemory);
  static_assert(producer_registers + WARPGROUPS * consumer_registers <= (1 + WARPGROUPS) * (65536 / threads / 8 * 8));
};

constexpr int kWidest = 768;  // columns of q

// The tiles that are compiled: f(Tile<PANELS, LAST>{}) of the one that holds K columns.
template <class F>
void with_tile(int K, F f) {
  const int last = (K - 1) % kPanelBytes / kDepth + 1;
  if (K > 3 * kPanelBytes)
    f(Tile<kWidest / kPanelBytes, 4>{});
  else if (last == 1)
    f(Tile<3, 1>{});
  else if (last == 2)
    f(Tile<3, 2>{});
  else if (last == 3)
    f(Tile<3, 3>{});
  else
    f(Tile<3, 4>{});
}

// Tiles of y: row blocks one after the other, tiles of columns within. A CTA takes a contiguous share, begun and ended
// anywhere in a row block, so that shares differ by one tile at most.
template <class T>
VITLR_HD constexpr int tiles(const Sizes& sizes) {
  return ceil_div(sizes.M, T::rows) * ceil_div(sizes.N, kTileColumns);
}

VITLR_HD constexpr int panels(const Sizes& sizes) { return ceil_div(sizes.K, kPanelBytes); }

// Pointers to bytes.
struct Matrices {
  const void* q;  // [M, K]
  const void* W;  // [N, K]
  void* y;        // [M, N]
};

// encode(address, rows, columns in pairs of bytes, box rows, box columns) -> Map.
template <class T, class Map, class Encode>
Maps<Map> maps_of(const Matrices& p, const Sizes& sizes, Encode encode) {
  return {encode(p.q, sizes.M, sizes.K / 2, T::rows, kPanelColumns),
          encode(p.W, sizes.N, sizes.K / 2, kTileColumns, kPanelColumns),
          encode(p.y, sizes.M, sizes.N / 2, kWarpgroupRows, kPanelColumns)};
}

// Why a shape does not run; empty where it does.
inline std::string objection(const Sizes& sizes) {
  if (sizes.M < 1 || sizes.M > 1 << 30) return "M = " + std::to_string(sizes.M) + ", expected 1 to 2^30";
  if (sizes.K < 16 || sizes.K % 16 || sizes.K > kWidest)
    return "K = " + std::to_string(sizes.K) + ", expected a multiple of 16 up to " + std::to_string(kWidest);
  if (sizes.N < 16 || sizes.N % 16) return "N = " + std::to_string(sizes.N) + ", expected a multiple of 16";
  if (sizes.parts < 1) return "no sums of squares of rows";
  return "";
}

void launch_linear(const Matrices&, const Sizes&, int ctas, void* stream);

}  // namespace vitlr::cuda::fp8
