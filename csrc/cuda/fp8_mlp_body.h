// An MLP of 8-bit floats for Hopper behind its first linear, written once for the GPU and for the emulation of tests/csrc:
//
//   h = e4m3(act(W₁ q) / s),   p = W₂ h,   y = W₃ e4m3(p / s₂) + b₃ + residual     scales and biases: fp8_mlp_tile.h
//
// The hidden layer is never written: FlashAttention with an activation in place of softmax, in bytes. The scale s of a
// row of h is known before its products (fp8_body.h), so sums add up over slices as they are. A unit of work is a slice
// of 128 hidden columns for a row block of 128; every CTA takes as many, begun and ended anywhere. Who does not begin
// a row block leaves its sums in memory; who does adds them up in their order, rounds, and multiplies by W₃. No
// atomics: results are the same every time.
//
// Accumulators become operands in their registers: rows of W₁, W₂ and W₃ come in the order of `woven` (tiles.h). Two
// warpgroups take turns to multiply, so that the activations of one run beside the products of the other.
//
// Ragged sizes cost the last slice and tile: TMA fills with zeros, what lies outside of y is not stored.
//
// Policy is what differs between GPU and emulation: fp8_hopper.h, tests/csrc/emulated_fp8.h.
#pragma once
#include "cuda/activations.h"
#include "cuda/fp8_mlp_tile.h"
#include "cuda/fp8_values.h"
#include "cuda/lowrank_producer.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::fp8_mlp {

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
  const auto mine = lowrank::share(units<T>(sizes), place_of(p), p.clusters());
  const int across = slices(sizes);
  lowrank::Cursor<T::slots> at;
  int segments = 0;
  // `count` panels of rows from `row` on, from the first column on.
  const auto load_panels = [&](const typename Policy::Map& map, int row) {
    p.wait(T::empty(at.slot), at.phase ^ 1);  // passes at once in the first round
    p.expect(T::full(at.slot), T::keys_bytes);
#pragma unroll 1
    for (int k = 0; k < T::panels; ++k)
      p.load_woven(map, T::slot(at.slot) + k * T::panel, T::full(at.slot), k * kPanelColumns, row);
    at.advance();
  };
  Segment part{};
#pragma unroll 1
  for (int unit = mine.begin; unit < mine.end; unit += part.end - part.begin) {
    part = segment_of(unit, mine.end, across);
    p.wait(T::taken, (segments++ & 1) ^ 1);
    p.expect(T::ready, T::held_bytes);
#pragma unroll 1
    for (int k = 0; k < T::panels; ++k)
      p.load(maps.q, T::held_panel(k, 0), T::ready, k * kPanelColumns, part.block * T::rows);
#pragma unroll 1
    for (int d = part.begin; d < part.end; ++d) {
      load_panels(maps.W1, d * kSlice);
      p.wait(T::empty(at.slot), at.phase ^ 1);
      p.expect(T::full(at.slot), T::values_bytes);
      p.load_woven(maps.W2, T::slot(at.slot), T::full(at.slot), d * kPanelColumns, 0);
      at.advance();
    }
    if (part.begin == 0)
#pragma unroll 1
      for (int n = 0; n < sizes.N; n += kColumns) load_panels(maps.W3, n);
  }
}

// A consumer: a warpgroup.
template <class T, class Policy>
class Consumer {
 public:
  VITLR_HD Consumer(Policy& policy, const Sizes& sizes) : p(policy), sizes(sizes), w(policy.warpgroup()) {}

  VITLR_HD void run() {
    const int place = place_of(p), across = slices(sizes), all = units<T>(sizes);
    const auto mine = lowrank::share(all, place, p.clusters());
    if (w == T::WARPGROUPS - 1 && mine.begin < mine.end) p.pass_turn(0);
    int segments = 0;
    Segment part{};
#pragma unroll 1
    for (int unit = mine.begin; unit < mine.end; unit += part.end - part.begin) {
      part = segment_of(unit, mine.end, across);
      row = part.block * T::rows + w * kWarpgroupRows;
      Rows rows;
      measure(rows);
      p.wait(T::ready, segments++ & 1);
      Sums sums;
      walk(rows, sums, part, unit + part.end - part.begin == mine.end);
      if (part.begin > 0) {
        leave(sums, place);
      } else {
        const int next = (part.block + 1) * across;
#pragma unroll 1
        for (int other = place + 1; lowrank::share(all, other, p.clusters()).begin < next && other < p.clusters(); ++other)
          gather(sums, other);
        Operand q2;
        round(rows, sums, q2);
        expand(rows, q2);
      }
    }
  }

 private:
  using Sums = typename Policy::template Registers<float, T::R / 2>;          // p [64, R]
  using Operand = typename Policy::template Registers<uint32_t, T::R / 8>;    // the same in bytes
  using Wide = typename Policy::template Registers<float, kSlice / 2>;        // W₁ q of a slice
  using Hidden = typename Policy::template Registers<uint32_t, kSlice / 8>;  // h in bytes
  using Output = typename Policy::template Registers<float, kColumns / 2>;    // [64, 128]
  using Rows = typename Policy::template Registers<float, 4>;  // of both rows of a lane: rows_scale, then s
  using Pair = typename Policy::template Registers<float, 2>;

  // What is known of each row before its products.
  VITLR_HD void measure(Rows& rows) {
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = row + lowrank::accumulator_row(lane, 2 * i);
        const bool there = m < sizes.M;
        const float* squares = sizes.squares + static_cast<int64_t>(m) * sizes.parts;
        rows(lane)[i] = there ? sizes.rows_scale[m] : 0;
        rows(lane)[2 + i] = fp8::known_scale<Policy>(squares, there ? sizes.parts : 0, sizes.reach, sizes.act).s;
      }
    });
  }

  // p = W₂ act(W₁ q) over the slices of a segment; `last`: of this CTA.
  VITLR_HD void walk(Rows& rows, Sums& sums, const Segment& part, bool last) {
    Wide wide;
    Hidden hidden;
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < T::R / 2; ++i) sums(lane)[i] = 0;
    });
    multiply_hidden(wide);
#pragma unroll 1
    for (int d = part.begin;; ++d) {
      p.template wait_products<0>(wide);
      p.arrive_warps(T::empty(keys));
      if (d + 1 == part.end) p.arrive_warps(T::taken);
      activate(rows, wide, hidden, d * kSlice);
      p.wait_turn(w);
      multiply_values(sums, hidden);
      if (d + 1 == part.end) break;  // here, so that the compiler sees which products are under way
      multiply_hidden(wide);
      p.template wait_products<1>(sums, hidden);
      p.arrive_warps(T::empty(values));
      p.pass_turn((w + 1) % T::WARPGROUPS);
    }
    p.template wait_products<0>(sums, hidden);
    p.arrive_warps(T::empty(values));
    // The very last turn of a kernel is passed to nobody.
    if (!(last && w == T::WARPGROUPS - 1)) p.pass_turn((w + 1) % T::WARPGROUPS);
  }

  // W₁ q of the next slice, not waited for.
  VITLR_HD void multiply_hidden(Wide& wide) {
    keys = wait_slot();
    const uint64_t q = lowrank::descriptor(p.address(T::held_panel(0, w)));
    const uint64_t W = lowrank::descriptor(p.address(T::slot(keys)));
    p.fence_registers();
#pragma unroll
    for (int i = 0; i < T::depth; ++i) {
      if (i == 0)
        p.template multiply_bytes<kSlice, true>(wide, q, W);
      else
        p.template multiply_bytes<kSlice>(wide, lowrank::advanced(q, T::depth_at(i)),
                                          lowrank::advanced(W, T::depth_at(i)));
    }
    p.commit();
  }

  // sums += h W₂ᵀ, not waited for.
  VITLR_HD void multiply_values(Sums& sums, Hidden& hidden) {
    values = wait_slot();
    const uint64_t W = lowrank::descriptor(p.address(T::slot(values)));
    p.fence_registers(sums, hidden);
#pragma unroll
    for (int i = 0; i < kSlice / kDepth; ++i)
      p.template multiply_operand<T::R>(sums, hidden, 4 * i, lowrank::advanced(W, i * kDepth));
    p.commit();
  }

  VITLR_HD void activate(Rows& rows, Wide& wide, Hidden& hidden, int first) {
    lowrank::with_activation(sizes.act, [&](auto choice) {
      if (first + kSlice <= sizes.D)
        activate<choice.act, true>(rows, wide, hidden, first);
      else
        activate<choice.act, false>(rows, wide, hidden, first);
    });
  }

  // WHOLE: no column lies beyond D. Those beyond meet zeros of W₂.
  template <Act ACT, bool WHOLE>
  VITLR_HD void activate(Rows& rows, Wide& wide, Hidden& hidden, int first) {
    p.lanes([&](int lane) {
      const float* r = rows(lane);
      const float* value = wide(lane);
      uint32_t* h = hidden(lane);
      const int column = first + lowrank::woven_column(lane, 0);
      fp8::Bytes<ACT, Policy> to[2] = {{r[2], fp8::inverse_of(r[2])}, {r[3], fp8::inverse_of(r[3])}};
#pragma unroll
      for (int j = 0; j < kSlice / 16; ++j) {
        const bool there = WHOLE || column + 16 * j < sizes.D;
        const auto by = Policy::four_floats(sizes.scale1, column + 16 * j, there);
        const auto b = Policy::four_floats(sizes.bias1, column + 16 * j, there && sizes.bias1 != nullptr);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* v = value + 8 * j + 2 * i;
          const uint32_t low = to[i].made(fmaf(v[0] * r[i], by.x, b.x), fmaf(v[1] * r[i], by.y, b.y));
          const uint32_t high = to[i].made(fmaf(v[4] * r[i], by.z, b.z), fmaf(v[5] * r[i], by.w, b.w));
          h[2 * j + i] = low | high << 16;
        }
      }
    });
  }

  // Sums to memory, as they are held, and those of another CTA from there.
  VITLR_HD void leave(Sums& sums, int place) {
    p.lanes([&](int lane) {
#pragma unroll
      for (int j = 0; j < T::R / 8; ++j) p.store_sums(kept(place, j, lane), sums(lane) + 4 * j);
    });
    p.publish(sizes.flags + place * T::WARPGROUPS + w, w);
  }

  VITLR_HD void gather(Sums& sums, int other) {
    p.await(sizes.flags + other * T::WARPGROUPS + w, w, T::left(w));
    p.lanes([&](int lane) {
#pragma unroll
      for (int j = 0; j < T::R / 8; ++j) {
        float more[4];
        p.load_sums(kept(other, j, lane), more);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums(lane)[4 * j + i] += more[i];
      }
    });
  }

  VITLR_HD float* kept(int place, int j, int lane) const {
    return sizes.sums + ((static_cast<int64_t>(place) * T::WARPGROUPS + w) * (T::R / 8) + j) * kWarpgroup * 4 + lane * 4;
  }

  // q₂ = e4m3(p / s₂): a whole row is here, so its largest entry says its scale, which takes the place of s.
  VITLR_HD void round(Rows& rows, Sums& sums, Operand& q2) {
    Pair largest;
    p.lanes([&](int lane) {
      const float* r = rows(lane);
      float most[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < T::R / 16; ++j) {
        const int column = lowrank::woven_column(lane, j);
        const auto by = Policy::four_floats(sizes.scale2, column, column < sizes.r2);
        const auto b = Policy::four_floats(sizes.bias2, column, column < sizes.r2 && sizes.bias2 != nullptr);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float* v = sums(lane) + 8 * j + 2 * i;
          v[0] = fmaf(v[0] * r[2 + i], by.x, b.x);
          v[1] = fmaf(v[1] * r[2 + i], by.y, b.y);
          v[4] = fmaf(v[4] * r[2 + i], by.z, b.z);
          v[5] = fmaf(v[5] * r[2 + i], by.w, b.w);
          most[i] = fmaxf(fmaxf(fmaxf(most[i], fabsf(v[0])), fmaxf(fabsf(v[1]), fabsf(v[4]))), fabsf(v[5]));
        }
      }
      largest(lane)[0] = most[0];
      largest(lane)[1] = most[1];
    });
    p.most_of_quads(largest);
    p.lanes([&](int lane) {
      float* r = rows(lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const fp8::Scale found = fp8::scale_of(largest(lane)[i]);
        r[2 + i] = found.s;
#pragma unroll
        for (int j = 0; j < T::R / 16; ++j) {
          const float* v = sums(lane) + 8 * j + 2 * i;
          const uint32_t low = Policy::bytes(v[0] * found.inverse, v[1] * found.inverse);
          const uint32_t high = Policy::bytes(v[4] * found.inverse, v[5] * found.inverse);
          q2(lane)[2 * j + i] = low | high << 16;
        }
      }
    });
  }

  // y = s₂ (scale₃ ⊙ (W₃ q₂)) + b₃ + residual, 128 columns at a time; four lanes store 32 bytes of a row.
  VITLR_HD void expand(Rows& rows, Operand& q2) {
#pragma unroll 1
    for (int n = 0; n < sizes.N; n += kColumns) {
      Output output;
      const int slot = wait_slot();
      const uint64_t W = lowrank::descriptor(p.address(T::slot(slot)));
      p.fence_registers(q2);
#pragma unroll
      for (int i = 0; i < T::depth; ++i) {
        if (i == 0)
          p.template multiply_operand<kColumns, true>(output, q2, 0, W);
        else
          p.template multiply_operand<kColumns>(output, q2, 4 * i, lowrank::advanced(W, T::depth_at(i)));
      }
      p.commit();
      p.template wait_products<0>(output, q2);
      p.arrive_warps(T::empty(slot));
      p.lanes([&](int lane) {
        const float* r = rows(lane);
#pragma unroll
        for (int j = 0; j < kColumns / 16; ++j) {
          const int column = n + lowrank::woven_column(lane, j);
          if (column >= sizes.N) continue;
          const auto by = Policy::four_floats(sizes.scale3, column, true);
          const auto b = Policy::four_floats(sizes.bias3, column, sizes.bias3 != nullptr);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int m = row + lowrank::accumulator_row(lane, 2 * i);
            if (m >= sizes.M) continue;
            const int64_t at = static_cast<int64_t>(m) * sizes.N + column;
            const float* v = output(lane) + 8 * j + 2 * i;
            const auto more = p.four_numbers(sizes.residual, at, sizes.fp16);
            const float four[4] = {fmaf(v[0] * r[2 + i], by.x, b.x) + more.x, fmaf(v[1] * r[2 + i], by.y, b.y) + more.y,
                                   fmaf(v[4] * r[2 + i], by.z, b.z) + more.z, fmaf(v[5] * r[2 + i], by.w, b.w) + more.w};
            p.store_numbers(sizes.y, at, four, sizes.fp16);
          }
        }
      });
    }
  }

  VITLR_HD int wait_slot() {
    p.wait(T::full(at.slot), at.phase);
    const int slot = at.slot;
    at.advance();
    return slot;
  }

  Policy& p;
  const Sizes& sizes;
  const int w;
  int row = 0;                   // the first of this warpgroup's in the row block
  int keys = 0, values = 0;      // slots of the slices of W₁ and W₂ that are multiplied
  lowrank::Cursor<T::slots> at;  // the next slot
};

}  // namespace vitlr::cuda::fp8_mlp
