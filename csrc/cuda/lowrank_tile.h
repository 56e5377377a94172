// Sizes and shared memory of a CTA of the low-rank kernels for Hopper, and which part of the work it takes.
#pragma once
#include "cuda/activations.h"
#include "cuda/host_device.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::lowrank {

constexpr int kColumns = 128;  // output columns a tile
constexpr int kMostSlots = 8;
constexpr int kMostRanks = 8;  // CTAs of a cluster: what every Hopper card allows
constexpr int kSharedMemory = 227 * 1024;  // that a CTA may ask for on sm_90

// What a kernel is told besides its tensor maps. K is the depth of the first product, D the hidden width
// (lowrank_linear: 0), r1 and r2 the ranks (lowrank_linear: the same), act the activation of the hidden tile or of the
// output.
struct Sizes {
  int M, K, D, N, r1, r2;
  Act act;
  bool residual;
  int items;   // row blocks times groups
  int groups;  // clusters that share the output columns of one row block
  const void* b1;
  const void* b2;
};

// The panels of tensors that TMA moves; Map is CUtensorMap, or what the emulation takes for one.
template <class Map>
struct Maps {
  Map x, B1, A1, B2, A2, residual, y;
};

// A CTA of WARPGROUPS consumer warpgroups for ranks up to R: one warpgroup of T or S is 64 rows by R.
template <int R_, int WARPGROUPS_>
struct Tile {
  static constexpr int R = R_, WARPGROUPS = WARPGROUPS_;
  static constexpr int rows = WARPGROUPS * kWarpgroupRows;
  static constexpr int panels = R / kPanelColumns;
  // Hidden columns a tile. The fewer, the more of shared memory's bandwidth the products take; but with three
  // warpgroups a thread has 160 registers, and 64 of S beside 64 of P are too many, as are 128 beside 64 with two (232
  // registers).
  static constexpr int hidden = (WARPGROUPS == 3 && R == 128) || (WARPGROUPS == 2 && R == 256) ? 96 : 128;
  static constexpr int threads = (WARPGROUPS + 1) * kWarpgroup;
  static constexpr int largest(int a, int b) { return a > b ? a : b; }
  // How many of `count` boxes share a slot: the most that fit and divide them.
  static constexpr int a_slot(int count, int bytes) {
    int most = count;
    while (most * bytes > slot_bytes || count % most) --most;
    return most;
  }

  // A ring of slots, each of which holds one panel, whichever comes next; panels of sums from other CTAs as well.
  static constexpr int slot_bytes = panel_bytes(largest(largest(rows, R), kColumns));
  static constexpr int operand_bytes = panel_bytes(rows) * panels;  // T, then S of other CTAs, then y
  static constexpr int barrier_bytes = 1024;
  static constexpr int room = kSharedMemory - 1024 - barrier_bytes - operand_bytes;  // 1024: to align what is given
  static constexpr int slots = room / slot_bytes < kMostSlots ? room / slot_bytes : kMostSlots;
  static constexpr int shared_bytes = barrier_bytes + operand_bytes + slots * slot_bytes;

  // A tile of A₁ is `panels` panels [hidden, 64], as many in a slot as fit; a tile of B₂ is `values` boxes [R,
  // value_columns]: 96 columns are three boxes of 32 (64 bytes a row).
  static constexpr int key_bytes = panel_bytes(hidden);
  static constexpr int keys_a_slot = a_slot(panels, key_bytes);
  static constexpr int value_columns = hidden % kPanelColumns == 0 ? kPanelColumns : 32;
  static constexpr int values = hidden / value_columns;
  static constexpr int value_bytes = R * value_columns * 2;
  static constexpr int values_a_slot = a_slot(values, value_bytes);
  static_assert(key_bytes % 1024 == 0 && value_bytes % 1024 == 0);

  // Registers a thread by setmaxnreg; 0: as many as it was launched with, which are no more than what the warpgroups
  // share.
  static constexpr int launch_registers = 65536 / threads / 8 * 8;
  static constexpr int producer_registers = WARPGROUPS == 3 ? 32 : WARPGROUPS == 2 ? 40 : 0;
  static constexpr int consumer_registers = WARPGROUPS == 3 ? 160 : WARPGROUPS == 2 ? 232 : 0;

  // Offsets in shared memory.
  static constexpr int operand = barrier_bytes;
  static constexpr int ring = operand + operand_bytes;
  VITLR_HD static constexpr int slot(int i) { return ring + i * slot_bytes; }
  VITLR_HD static constexpr int full(int i) { return 8 * i; }
  VITLR_HD static constexpr int empty(int i) { return 8 * (kMostSlots + i); }
  static constexpr int ready = 8 * 2 * kMostSlots;  // the rings of all CTAs of the cluster are drained
  static constexpr int taken = ready + 8;           // the sums that came into this ring have been read
  VITLR_HD static constexpr int incoming(int w) { return taken + 8 + 8 * w; }
  VITLR_HD static constexpr int gathered(int w) { return taken + 32 + 8 * w; }

  // A warpgroup's rows of the operand, and its part of the ring while sums are exchanged.
  VITLR_HD static constexpr int operand_panel(int w, int q) {
    return operand + q * panel_bytes(rows) + w * panel_bytes(kWarpgroupRows);
  }
  // ... and the j-th of R / 8 blocks of 1024 bytes in the same panels, for what does not go through TMA or wgmma.
  VITLR_HD static constexpr int operand_block(int w, int j) { return operand_panel(w, j / 8) + j % 8 * 1024; }
  VITLR_HD static constexpr int exchange(int w) { return ring + w * kWarpgroupRows * R * 4; }

  static_assert(R % kPanelColumns == 0 && R <= 256 && rows <= 256, "boxes of TMA have at most 256 rows");
  static_assert(slots >= 4 && slots >= panels && shared_bytes + 1024 <= kSharedMemory);
  static_assert(slots * slot_bytes >= rows * R * 4, "sums that are exchanged fit the ring");
  static_assert(producer_registers + WARPGROUPS * consumer_registers <= (1 + WARPGROUPS) * launch_registers);
};

// A contiguous part of `count` things for each of `parts`, in order; sizes differ by one at most.
struct Range {
  int begin, end;
};

VITLR_HD constexpr Range share(int count, int part, int parts) {
  return {static_cast<int>(static_cast<int64_t>(count) * part / parts),
          static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts)};
}

// What a CTA does of an item. Of the MLP: all of K (T is computed by every CTA of the cluster, it is a tenth of the
// work), its share of the hidden tiles. Of lowrank_linear: its share of K. Of both: its share of the output tiles.
struct Part {
  int row;
  Range depth, hidden, columns;
};

template <class T, bool MLP>
VITLR_HD Part part_of(const Sizes& sizes, int item, int rank, int ranks) {
  const int steps = ceil_div(sizes.K, kPanelColumns), group = item % sizes.groups;
  Part part{};
  part.row = item / sizes.groups * T::rows;
  part.depth = MLP ? share(steps, 0, 1) : share(steps, rank, ranks);
  if (MLP) part.hidden = share(ceil_div(sizes.D, T::hidden), rank, ranks);
  part.columns = share(ceil_div(sizes.N, kColumns), group * ranks + rank, sizes.groups * ranks);
  return part;
}

}  // namespace vitlr::cuda::lowrank
