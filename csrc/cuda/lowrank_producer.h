// The producer of lowrank_body.h: which panels come in which order, and the barriers of the ring through which they go.
#pragma once
#include "cuda/lowrank_tile.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::lowrank {

// Where in the ring a role is. The n-th pass over a slot has phase n mod 2.
template <int SLOTS>
struct Cursor {
  int slot = 0;
  uint32_t phase = 0;
  VITLR_HD void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Who arrives at which barrier, once before everything starts: full by the producer (and the bytes of TMA), empty by
// every consumer warp, as each finishes its own quarter of a product.
template <class T, class Policy>
VITLR_HD void initialise(Policy& p) {
  for (int i = 0; i < T::slots; ++i) {
    p.initialise(T::full(i), 1);
    p.initialise(T::empty(i), 4 * T::WARPGROUPS);
  }
  p.initialise(T::ready, p.ranks());
  p.initialise(T::taken, 4 * T::WARPGROUPS);
  for (int w = 0; w < T::WARPGROUPS; ++w) {
    p.initialise(T::incoming(w), 1);
    p.initialise(T::gathered(w), 1);
  }
}

// The producer: one thread.
template <class T, bool MLP, class Policy>
VITLR_HD void produce(Policy& p, const Sizes& sizes, const Maps<typename Policy::Map>& maps) {
  Cursor<T::slots> at;
  uint32_t exchanged = 0;
  // One slot: `boxes` boxes of `bytes`, `step` columns from one to the next.
  const auto load = [&](const typename Policy::Map& map, int column, int row, int bytes, int boxes = 1, int step = 0) {
    p.wait(T::empty(at.slot), at.phase ^ 1);  // passes at once in the first round
    p.expect(T::full(at.slot), boxes * bytes);
#pragma unroll 1
    for (int i = 0; i < boxes; ++i)
      p.load(map, T::slot(at.slot) + i * bytes, T::full(at.slot), column + i * step, row);
    at.advance();
  };
#pragma unroll 1
  for (int item = p.cluster(); item < sizes.items; item += p.clusters()) {
    const Part part = part_of<T, MLP>(sizes, item, p.rank(), p.ranks());
#pragma unroll 1
    for (int k = part.depth.begin; k < part.depth.end; ++k) {
      load(maps.x, k * kPanelColumns, part.row, panel_bytes(T::rows));
      load(maps.B1, k * kPanelColumns, 0, panel_bytes(T::R));
    }
#pragma unroll 1
    for (int d = part.hidden.begin; d < part.hidden.end; ++d) {
#pragma unroll 1
      for (int q = 0; q < T::panels; q += T::keys_a_slot)
        load(maps.A1, q * kPanelColumns, d * T::hidden, T::key_bytes, T::keys_a_slot, kPanelColumns);
#pragma unroll 1
      for (int q = 0; q < T::values; q += T::values_a_slot)
        load(maps.B2, d * T::hidden + q * T::value_columns, 0, T::value_bytes, T::values_a_slot, T::value_columns);
    }
    if (p.ranks() > 1) {
      Cursor<T::slots> drained = at;
#pragma unroll 1
      for (int i = 0; i < T::slots; ++i, drained.advance()) p.wait(T::empty(drained.slot), drained.phase ^ 1);
#pragma unroll 1
      for (int rank = 0; rank < p.ranks(); ++rank) p.arrive_at(rank, T::ready);
      p.wait(T::taken, exchanged++ & 1);
    }
#pragma unroll 1
    for (int n = part.columns.begin; n < part.columns.end; ++n) {
#pragma unroll 1
      for (int q = 0; q < T::panels; ++q) load(maps.A2, q * kPanelColumns, n * kColumns, panel_bytes(kColumns));
      if (sizes.residual)
#pragma unroll 1
        for (int q = 0; q < panels(kColumns); ++q)
          load(maps.residual, n * kColumns + q * kPanelColumns, part.row, panel_bytes(T::rows));
    }
  }
}

}  // namespace vitlr::cuda::lowrank
