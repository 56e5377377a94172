// The low-rank kernels for Hopper, written once for the GPU and for the emulation of tests/csrc.
//
//   MLP:    y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual     FlashAttention with an activation in place of softmax
//   linear: y = act(A₂ (B₁ x) + b₂) + residual                  for few rows
//
// A CTA takes row blocks ("items"), a cluster of CTAs one row block at a time. One thread (`produce`,
// lowrank_producer.h) asks TMA for panels in the order in which they are used, into a ring of slots; each warpgroup
// (`Consumer`) owns 64 rows and multiplies:
//
//   1. T = x B₁ᵀ [64, R] in registers; MLP: rounded, to shared memory, as operand of
//   2. for each hidden tile: P = T A₁ᵀ, H = act(P + b₁) in registers, S += H B₂ᵀ. Warpgroups take turns to multiply, so
//      that the activations of one run beside the products of the others.
//   3. sums of a cluster are exchanged through distributed shared memory: every CTA adds up its share of the columns in
//      the order of ranks, rounds, and gives them to all. No atomics: results are the same every time.
//   4. y = S A₂ᵀ + b₂ + residual, through shared memory and TMA.
//
// Ragged sizes cost nothing but the last tile: TMA fills with zeros what lies outside of a tensor, and does not write
// there. Zeros times Inf would be NaN, so T, H and S are zeroed beyond their widths.
//
// Policy is what differs between GPU and emulation: hopper.h, tests/csrc/emulated_hopper.h.
#pragma once
#include "cuda/activations.h"
#include "cuda/lowrank_producer.h"
#include "cuda/lowrank_tile.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::lowrank {

// A consumer: a warpgroup.
template <class T, bool MLP, class Policy>
class Consumer {
 public:
  VITLR_HD Consumer(Policy& policy, const Sizes& sizes, const Maps<typename Policy::Map>& maps)
      : p(policy), sizes(sizes), maps(maps), w(policy.warpgroup()) {}

  VITLR_HD void run() {
    constexpr bool ordered = MLP && T::WARPGROUPS > 1;
    if (ordered && w == T::WARPGROUPS - 1 && p.cluster() < sizes.items) p.pass_turn(0);
    for (int item = p.cluster(); item < sizes.items; item += p.clusters()) {
      part = part_of<T, MLP>(sizes, item, p.rank(), p.ranks());
      last = item + p.clusters() >= sizes.items;
      Operand s;
      {
        Sums sums;
        shrink(sums);
        if constexpr (MLP) {
          keep(sums);
          walk_hidden(sums);
        }
        if (p.ranks() > 1)
          exchange(sums, s);
        else
          round(sums, s);
      }
      expand(s);
      ++items;
    }
  }

 private:
  using Sums = typename Policy::template Registers<float, T::R / 2>;           // [64, R]
  using Operand = typename Policy::template Registers<uint32_t, T::R / 4>;     // the same in 16 bits
  using Wide = typename Policy::template Registers<float, T::hidden / 2>;      // [64, hidden]
  using Hidden = typename Policy::template Registers<uint32_t, T::hidden / 4>; // the same in 16 bits
  using Output = typename Policy::template Registers<float, kColumns / 2>;     // [64, 128]
  static constexpr int steps = kPanelColumns / kStep;

  // 1. T = x B₁ᵀ over this CTA's part of K; the products of one step run while the next one's panels are waited for.
  VITLR_HD void shrink(Sums& sums) {
    clear(sums);
#pragma unroll 1
    for (int k = part.depth.begin; k < part.depth.end; ++k) {
      const uint64_t x = advanced(wait_panel(), w * panel_bytes(kWarpgroupRows)), B = wait_panel();
      p.fence_registers(sums);
#pragma unroll
      for (int i = 0; i < steps; ++i)
        p.template multiply<T::R>(sums, advanced(x, i * kStepBytes), advanced(B, i * kStepBytes));
      p.commit();
      if (k > part.depth.begin) {
        p.template wait_products<1>(sums);
        release(4, 2);
      }
    }
    p.template wait_products<0>(sums);
    release(2, 2);
  }

  // Not by a first product that sets them: sums would then seem to live on through the end of the item before.
  VITLR_HD void clear(Sums& sums) {
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < T::R / 2; ++i) sums(lane)[i] = 0;
    });
  }

  // T in 16 bits to shared memory, where the products read it.
  VITLR_HD void keep(Sums& sums) {
    p.once([&] { p.template wait_stores<0>(); });  // the last item's output left from there
    p.synchronise(w);
    p.lanes([&](int lane) {
      const float* value = sums(lane);
#pragma unroll
      for (int i = 0; i < T::R / 2; i += 2) {
        const int row = accumulator_row(lane, i), column = accumulator_column(lane, i);
        const uint32_t pair = Policy::pack(value[i], value[i + 1]);
        p.store_shared(panel_address(T::operand_panel(w, column / kPanelColumns), row, column % kPanelColumns),
                       column < sizes.r1 ? pair : 0);
      }
    });
    p.fence_async();  // every writer, before the barrier: wgmma reads through the asynchronous proxy
    p.synchronise(w);
  }

  // 2. S = Σ act(T A₁ᵀ + b₁) B₂ᵀ over this CTA's hidden tiles.
  VITLR_HD void walk_hidden(Sums& sums) {
    constexpr bool ordered = T::WARPGROUPS > 1;
    Wide wide;
    Hidden hidden;
    clear(sums);
    multiply_hidden(wide);
    for (int d = part.hidden.begin;; ++d) {
      p.template wait_products<0>(wide);
      release(T::panels / T::keys_a_slot, T::panels / T::keys_a_slot);
      activate_hidden(wide, hidden, d);
      if (ordered) p.wait_turn(w);
#pragma unroll
      for (int q = 0; q < T::values; q += T::values_a_slot) {
        const uint64_t B = descriptor<T::value_columns * 2>(p.address(wait_slot()));
        p.fence_registers(sums, hidden);
#pragma unroll
        for (int i = 0; i < T::values_a_slot * T::value_columns / kStep; ++i) {
          constexpr int a_box = T::value_columns / kStep;
          p.template multiply_registers<T::R>(sums, hidden, (q * a_box + i) * 4,
                                              advanced(B, i / a_box * T::value_bytes + i % a_box * kStepBytes));
        }
      }
      p.commit();
      p.template wait_products<0>(sums, hidden);
      release(T::values / T::values_a_slot, T::values / T::values_a_slot);
      if (d + 1 == part.hidden.end) break;  // here, so that the compiler sees that no product is under way
      multiply_hidden(wide);
      if (ordered) p.pass_turn((w + 1) % T::WARPGROUPS);
    }
    // The very last turn of a kernel is passed to nobody.
    if (ordered && !(last && w == T::WARPGROUPS - 1)) p.pass_turn((w + 1) % T::WARPGROUPS);
  }

  // P = T A₁ᵀ of the next hidden tile, not waited for.
  VITLR_HD void multiply_hidden(Wide& wide) {
#pragma unroll
    for (int q = 0; q < T::panels; q += T::keys_a_slot) {
      const uint64_t A = wait_panel(), t = descriptor(p.address(T::operand_panel(w, q)));
      p.fence_registers();
#pragma unroll
      for (int i = 0; i < T::keys_a_slot * steps; ++i) {
        const uint64_t left = advanced(t, i / steps * panel_bytes(T::rows) + i % steps * kStepBytes);
        const uint64_t right = advanced(A, i / steps * T::key_bytes + i % steps * kStepBytes);
        if (q + i == 0)
          p.template multiply<T::hidden, true>(wide, left, right);
        else
          p.template multiply<T::hidden>(wide, left, right);
      }
    }
    p.commit();
  }

  VITLR_HD void activate_hidden(Wide& wide, Hidden& hidden, int d) {
    const int left = sizes.D - d * T::hidden;  // columns of this tile that are there
    with_activation(sizes.act, [&](auto choice) {
      p.lanes([&](int lane) {
        const float* value = wide(lane);
        uint32_t* h = hidden(lane);
#pragma unroll
        for (int j = 0; j < T::hidden / 8; ++j) {
          const int column = accumulator_column(lane, 4 * j);
          const auto b = Policy::pair(sizes.b1, d * T::hidden + column, column < left);
          h[2 * j] = active<choice.act>(value[4 * j] + b.x, value[4 * j + 1] + b.y);
          h[2 * j + 1] = active<choice.act>(value[4 * j + 2] + b.x, value[4 * j + 3] + b.y);
        }
      });
    });
    if (left < T::hidden)
      p.lanes([&](int lane) {
        uint32_t* h = hidden(lane);
#pragma unroll
        for (int i = 0; i < T::hidden / 4; ++i)
          if (accumulator_column(lane, 2 * i) >= left) h[i] = 0;
      });
  }

  template <Act ACT>
  VITLR_HD static uint32_t active(float a, float b) {
    return Policy::pack(activate<ACT>(a, typename Policy::Type{}), activate<ACT>(b, typename Policy::Type{}));
  }

  // Sums in 16 bits, zero beyond the rank, as the operand of the last product.
  VITLR_HD void round(Sums& sums, Operand& s) {
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < T::R / 4; ++i) s(lane)[i] = rounded(sums(lane) + 2 * i, lane, i);
    });
  }

  VITLR_HD uint32_t rounded(const float* two, int lane, int i) const {
    const uint32_t pair = Policy::pack(two[0], two[1]);
    return accumulator_column(lane, 2 * i) < sizes.r2 ? pair : 0;
  }

  // 3. Adds up the sums of all CTAs of the cluster: of R / 8 blocks of eight columns each rank owns as many. What a
  // lane sends is read by the same lane of the other CTA, so it lies as it is held: 16 bytes a lane and block.
  VITLR_HD void exchange(Sums& sums, Operand& s) {
    constexpr int blocks = T::R / 8, block_bytes = kWarpgroup * 16, rounded_bytes = kWarpgroup * 8;
    const int mine = p.rank(), ranks = p.ranks(), more = ranks - 1, unit = block_bytes / ranks;
    p.wait_cluster(T::ready, items & 1);
    p.once([&] {
      p.expect(T::incoming(w), (ranks - 1) * blocks * unit);
      p.expect(T::gathered(w), blocks * rounded_bytes);
    });
    p.lanes([&](int lane) {
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        const int owner = j & more;
        if (owner != mine)
          p.send(owner, T::exchange(w) + (mine * blocks + j - owner) * unit + lane * 16, T::incoming(w),
                 sums(lane) + 4 * j);
      }
    });
    p.wait_cluster(T::incoming(w), items & 1);
    p.lanes([&](int lane) {
#pragma unroll
      for (int j = 0; j < blocks; ++j)
        if ((j & more) == mine) {
          float sum[4] = {0, 0, 0, 0};
#pragma unroll 1
          for (int rank = 0; rank < ranks; ++rank) {
            float other[4];
            if (rank != mine)
              p.load_shared(T::exchange(w) + (rank * blocks + j - mine) * unit + lane * 16, other);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += rank == mine ? sums(lane)[4 * j + i] : other[i];
          }
          const uint32_t two[2] = {rounded(sum, lane, 2 * j), rounded(sum + 2, lane, 2 * j + 1)};
#pragma unroll 1
          for (int rank = 0; rank < ranks; ++rank)
            p.send(rank, T::operand_block(w, j) + lane * 8, T::gathered(w), two);
        }
    });
    p.fence_async();  // TMA writes over what was read here
    p.arrive_warps(T::taken);
    p.wait_cluster(T::gathered(w), items & 1);
    p.lanes([&](int lane) {
#pragma unroll
      for (int j = 0; j < blocks; ++j)
        p.load_shared(T::operand_block(w, j) + lane * 8, s(lane) + 2 * j);
    });
  }

  // 4. y = S A₂ᵀ + b₂ + residual, 64 columns at a time through the operand's memory.
  VITLR_HD void expand(Operand& s) {
    constexpr int stages = T::R / kPanelColumns < 2 ? 1 : 2;
#pragma unroll 1
    for (int n = part.columns.begin; n < part.columns.end; ++n) {
      Output wide;
#pragma unroll
      for (int q = 0; q < T::panels; ++q) {
        const uint64_t A = wait_panel();
        p.fence_registers(s);
#pragma unroll
        for (int i = 0; i < steps; ++i)
          if (q + i == 0)
            p.template multiply_registers<kColumns, true>(wide, s, 0, A);
          else
            p.template multiply_registers<kColumns>(wide, s, (q * steps + i) * 4, advanced(A, i * kStepBytes));
      }
      p.commit();
      p.template wait_products<0>(wide, s);
      release(T::panels, T::panels);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = n * kColumns + half * kPanelColumns, stage = T::operand_panel(w, half % stages);
        p.once([&] { p.template wait_stores<stages - 1>(); });
        p.synchronise(w);
        const int slot = sizes.residual ? wait_slot() : 0;
        with_activation(MLP ? Act::none : sizes.act, [&](auto choice) {
          p.lanes([&](int lane) {
#pragma unroll
            for (int j = 0; j < kPanelColumns / 8; ++j) {
              const int c = accumulator_column(lane, 4 * j);
              const auto b = Policy::pair(sizes.b2, column + c, column + c < sizes.N);
#pragma unroll
              for (int i = 0; i < 4; i += 2) {
                const float* value = wide(lane) + half * 32 + 4 * j + i;
                const int row = accumulator_row(lane, i);
                float v[2] = {activate<choice.act>(value[0] + b.x, typename Policy::Type{}),
                              activate<choice.act>(value[1] + b.y, typename Policy::Type{})};
                if (sizes.residual) {
                  const auto more = Policy::unpack(
                      p.load_shared(panel_address(slot + w * panel_bytes(kWarpgroupRows), row, c)));
                  v[0] += more.x;
                  v[1] += more.y;
                }
                p.store_shared(panel_address(stage, row, c), Policy::pack(v[0], v[1]));
              }
            }
          });
        });
        p.fence_async();  // TMA reads what was written here, and writes over the residual that was read
        if (sizes.residual) release(1, 1);
        p.synchronise(w);
        p.once([&] {
          if (column < sizes.N && part.row + w * kWarpgroupRows < sizes.M)
            p.store(maps.y, stage, column, part.row + w * kWarpgroupRows);
          p.commit_stores();
        });
      }
    }
    p.once([&] { p.template wait_stores<0>(); });  // before anything else comes there, and before the CTA ends
  }

  VITLR_HD int wait_slot() {
    p.wait(T::full(at.slot), at.phase);
    const int slot = T::slot(at.slot);
    at.advance();
    return slot;
  }

  VITLR_HD uint64_t wait_panel() { return descriptor(p.address(wait_slot())); }

  // Gives back `count` slots, the first of them `before` slots behind the next one.
  VITLR_HD void release(int before, int count) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int slot = at.slot - before + i;
      p.arrive_warps(T::empty(slot < 0 ? slot + T::slots : slot));
    }
  }

  Policy& p;
  const Sizes& sizes;
  const Maps<typename Policy::Map>& maps;
  const int w;
  Part part{};
  Cursor<T::slots> at;  // the next panel
  uint32_t items = 0;
  bool last = false;
};

}  // namespace vitlr::cuda::lowrank
