// One linear of 8-bit floats for Hopper, bytes in and bytes out, written once for the GPU and for the emulation of tests/csrc:
//
//   p = rows_scale (scale ⊙ (W q)) + b,   y = e4m3(act(p) / s),   s the power of two over ‖row‖ reach₀ + reach₁
//
// A persistent CTA holds a row block of q whole and lets tiles of W pass by, its share of the tiles of y
// (fp8_tile.h): W is read from L2 once a row block of 192, q once a CTA. One thread (`produce`) asks TMA for panels; three
// warpgroups (`Consumer`) own 64 rows each and are free to drift apart by as much as the ring has slots, so that one
// activates while the others multiply. Sums of squares of rows are left tile by tile: no atomics, results are the
// same every time.
//
// Ragged sizes cost the last tile: TMA fills with zeros and does not write outside.
//
// Policy is what differs between GPU and emulation: fp8_hopper.h, tests/csrc/emulated_hopper.h.
#pragma once
#include "cuda/activations.h"
#include "cuda/fp8_tile.h"
#include "cuda/fp8_values.h"
#include "cuda/lowrank_producer.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::fp8 {

template <class T, class Policy>
VITLR_HD void initialise(Policy& p) {
  for (int i = 0; i < T::slots; ++i) {
    p.initialise(T::full(i), 1);
    p.initialise(T::empty(i), 4 * T::WARPGROUPS);
  }
  p.initialise(T::ready, 1);
  p.initialise(T::taken, 4 * T::WARPGROUPS);
}

// The producer: one thread.
template <class T, class Policy>
VITLR_HD void produce(Policy& p, const Sizes& sizes, const Maps<typename Policy::Map>& maps) {
  const auto mine = lowrank::share(tiles<T>(sizes), p.cluster(), p.clusters());
  const int across = ceil_div(sizes.N, kTileColumns), deep = panels(sizes);
  lowrank::Cursor<T::slots> at;
  int blocks = 0, block = -1;
#pragma unroll 1
  for (int tile = mine.begin; tile < mine.end; ++tile) {
    if (tile / across != block) {
      block = tile / across;
      p.wait(T::taken, (blocks++ & 1) ^ 1);  // passes at once the first time
      p.expect(T::ready, deep * panel_bytes(T::rows));
#pragma unroll 1
      for (int k = 0; k < deep; ++k)
        p.load(maps.q, T::held_panel(k, 0), T::ready, k * kPanelColumns, block * T::rows);
    }
#pragma unroll 1
    for (int k = 0; k < deep; ++k, at.advance()) {
      p.wait(T::empty(at.slot), at.phase ^ 1);
      p.expect(T::full(at.slot), T::slot_bytes);
      p.load(maps.W, T::slot(at.slot), T::full(at.slot), k * kPanelColumns, tile % across * kTileColumns);
    }
  }
}

// A consumer: a warpgroup.
template <class T, class Policy>
class Consumer {
 public:
  VITLR_HD Consumer(Policy& policy, const Sizes& sizes, const Maps<typename Policy::Map>& maps)
      : p(policy), sizes(sizes), maps(maps), w(policy.warpgroup()) {}

  VITLR_HD void run() {
    const auto mine = lowrank::share(tiles<T>(sizes), p.cluster(), p.clusters());
    const int across = ceil_div(sizes.N, kTileColumns);
    int blocks = 0, block = -1;
    Rows rows;
    Sums sums;
#pragma unroll 1
    for (int tile = mine.begin; tile < mine.end; ++tile) {
      const int column = tile % across;
      if (tile / across != block) {
        block = tile / across;
        row = block * T::rows + w * kWarpgroupRows;
        measure(rows);
        p.wait(T::ready, blocks++ & 1);
      }
      multiply(sums);
      if (column + 1 == across || tile + 1 == mine.end) p.arrive_warps(T::taken);
      finish(rows, sums, column);
    }
    p.once([&] { p.template wait_stores<0>(); });
  }

 private:
  using Sums = typename Policy::template Registers<float, kTileColumns / 2>;
  using Rows = typename Policy::template Registers<float, 6>;  // of both rows of a lane: rows_scale, s, 1 / s
  using Pair = typename Policy::template Registers<float, 2>;
  static constexpr int steps = kPanelBytes / kDepth;

  // What is known of each row before its products.
  VITLR_HD void measure(Rows& rows) {
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row + lowrank::accumulator_row(lane, 2 * i);
        const bool there = m < sizes.M;
        const Scale found = known_scale<Policy>(sizes.squares + static_cast<int64_t>(m) * sizes.parts,
                                                there ? sizes.parts : 0, sizes.reach, sizes.act);
        float* r = rows(lane);
        r[i] = there ? sizes.rows_scale[m] : 0;
        r[2 + i] = found.s;
        r[4 + i] = found.inverse;
      }
    });
  }

  // sums = q Wᵀ of a tile; the products of one panel run while the next one is waited for.
  VITLR_HD void multiply(Sums& sums) {
    const int deep = panels(sizes);
    uint64_t q = lowrank::descriptor(p.address(T::held_panel(0, w)));
#pragma unroll 1
    for (int k = 0; k + 1 < deep; ++k, q = lowrank::advanced(q, panel_bytes(T::rows))) {
      multiply_panel<steps>(sums, q, k > 0);
      if (k > 0) {
        p.template wait_products<1>(sums);
        release(2);
      }
    }
    multiply_panel<T::last>(sums, q, deep > 1);
    p.template wait_products<0>(sums);
    if (deep > 1) release(2);
    release(1);
  }

  template <int STEPS>
  VITLR_HD void multiply_panel(Sums& sums, uint64_t q, bool add) {
    p.wait(T::full(at.slot), at.phase);
    const uint64_t W = lowrank::descriptor(p.address(T::slot(at.slot)));
    at.advance();
    p.fence_registers(sums);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      p.template multiply_bytes<kTileColumns>(sums, lowrank::advanced(q, i * kDepth), lowrank::advanced(W, i * kDepth),
                                              add || i > 0);
    p.commit();
  }

  // Gives back the slot that lies so many behind the next one.
  VITLR_HD void release(int before) {
    const int slot = at.slot - before;
    p.arrive_warps(T::empty(slot < 0 ? slot + T::slots : slot));
  }

  // Activated, to bytes, to memory; the rows' sums of squares and, with the first tile of columns, their scales.
  VITLR_HD void finish(Rows& rows, Sums& sums, int column) {
    const int n = column * kTileColumns;
    p.once([&] { p.template wait_stores<0>(); });  // the last tile left from there
    p.synchronise(w);
    Pair squares;
    lowrank::with_activation(sizes.act, [&](auto choice) {
      if (n + kTileColumns <= sizes.N)
        activate<choice.act, true>(rows, sums, n, squares);
      else
        activate<choice.act, false>(rows, sums, n, squares);
    });
    p.fence_async();  // TMA reads what was written here
    p.synchronise(w);
    p.once([&] {
      if (row < sizes.M) p.store(maps.y, T::stage(w), n / 2, row);
      p.commit_stores();
    });
    p.add_quads(squares);
    p.lanes([&](int lane) {
      if (lane % 4) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row + lowrank::accumulator_row(lane, 2 * i);
        if (m >= sizes.M) continue;
        sizes.y_squares[static_cast<int64_t>(m) * ceil_div(sizes.N, kTileColumns) + column] = squares(lane)[i];
        if (column == 0) sizes.y_scale[m] = rows(lane)[2 + i];
      }
    });
  }

  // Bytes to the stage, sums of squares; WHOLE: no column lies beyond N.
  template <Act ACT, bool WHOLE>
  VITLR_HD void activate(Rows& rows, Sums& sums, int n, Pair& squares) {
    p.lanes([&](int lane) {
      const float* r = rows(lane);
      const int column = n + lane % 4 * 2;
      const float *scale = sizes.scale + column, *bias = sizes.bias == nullptr ? nullptr : sizes.bias + column;
      const uint32_t place = lowrank::panel_address(T::stage(w), lowrank::accumulator_row(lane, 0), 0) + lane % 4 * 2;
      Bytes<ACT, Policy> to[2] = {{r[2], r[4]}, {r[3], r[5]}};
#pragma unroll
      for (int j = 0; j < kTileColumns / 8; ++j) {
        if (!WHOLE && column + 8 * j >= sizes.N) continue;
        const auto by = Policy::pair_of_floats(scale, 8 * j, true);
        const auto b = Policy::pair_of_floats(bias, 8 * j, bias != nullptr);
        const uint32_t at = (place ^ (j / 2 * 16)) + j % 2 * 8;  // the swizzle moves whole 16 bytes
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* value = sums(lane) + 4 * j + 2 * i;
          p.store_pair(at + i * 8 * lowrank::kPanelRowBytes,  // eight rows on, where the swizzle is the same
                       to[i].made(fmaf(value[0] * r[i], by.x, b.x), fmaf(value[1] * r[i], by.y, b.y)));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) squares(lane)[i] = to[i].squares();
    });
  }

  Policy& p;
  const Sizes& sizes;
  const Maps<typename Policy::Map>& maps;
  const int w;
  int row = 0;                  // the first of this warpgroup's in the row block
  lowrank::Cursor<T::slots> at;  // the next panel of W
};

}  // namespace vitlr::cuda::fp8
