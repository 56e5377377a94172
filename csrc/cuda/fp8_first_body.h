// Rows of floats to bytes and their first linear for Hopper, written once for the GPU and for the emulation of tests/csrc:
//
//   q = e4m3(x' / s),   y = e4m3(p / s₁),   p = s (scale ⊙ (W q)) + b     x' = x or its LayerNorm: fp8_first_tile.h
//
// x is read once, q never written. W lies whole in shared memory, and N = 32 rows of x at a time are the narrow side of
// the product, `pᵀ = W qᵀ`: few enough that their loads, two groups ahead in registers, keep memory busy to the
// end, and that every processor takes as many. A warp owns rows of x, so its lanes find a row's norm and scale; then
// four warpgroups own 64 rows each of W. While these are multiplied, the next group becomes bytes.
//
// Ragged sizes cost the last group: what lies outside of x is zero, TMA does not write outside of y.
//
// Policy is what differs between GPU and emulation: fp8_hopper.h, tests/csrc/emulated_fp8.h.
#pragma once
#include "cuda/fp8_first_tile.h"
#include "cuda/fp8_values.h"
#include "cuda/tiles.h"

namespace vitlr::cuda::fp8_first {

template <class T, class Policy>
VITLR_HD void initialise(Policy& p) {
  for (int k = 0; k < T::panels; ++k) p.initialise(T::full(k), 1);
  p.initialise(T::ready, T::warps);
  for (int n = 0; n < 2; ++n) p.initialise(T::summed(n), T::warps);
}

// One thread, once: panels of W.
template <class T, class Policy>
VITLR_HD void produce(Policy& p, const Sizes& sizes, const Maps<typename Policy::Map>& maps) {
#pragma unroll 1
  for (int k = 0; k < ceil_div(sizes.K, kPanelBytes); ++k) {
    p.expect(T::full(k), T::W_panel);
    p.load(maps.W, T::W + k * T::W_panel, T::full(k), k * kPanelColumns, 0);
  }
}

// A warpgroup. `Type`: of the floats.
template <class T, class Type, class Policy>
class Consumer {
 public:
  VITLR_HD Consumer(Policy& policy, const Sizes& sizes, const Maps<typename Policy::Map>& maps, int w)
      : p(policy), sizes(sizes), maps(maps), w(w), mine(lowrank::share(groups<T>(sizes), p.cluster(), p.clusters())) {}

  VITLR_HD void run() {
    if (w == 0 && p.cluster() == 0)
      p.lanes([&](int lane) {
        for (int i = lane; i < sizes.count; i += kWarpgroup) sizes.flags[i] = 0;
      });
    const int count = mine.end - mine.begin;
    Packed even, odd;
    load(even, 0);
    load(odd, 1);
    round(even, 0);
    p.arrive_warps(T::ready);
    load(even, 2);
#pragma unroll 1
    for (int n = 0; n < count; n += 2) {
      step(odd, n);
      if (n + 1 < count) step(even, n + 1);
    }
    p.once([&] { p.template wait_stores<0>(); });
  }

 private:
  static constexpr int N = T::N;
  using Sums = typename Policy::template Registers<float, N / 2>;                     // pᵀ [64, N]
  using Made = typename Policy::template Registers<uint32_t, N / 4>;                  // in bytes, two rows of x each
  using Squares = typename Policy::template Registers<float, N / 4>;                  // of the rows of x of a lane
  using Packed = typename Policy::template Registers<uint32_t, T::each * 4 * kParts>;  // rows of x as they come
  using Row = typename Policy::template Registers<float, kEight * kParts>;             // one in floats
  template <int COUNT>
  using Found = typename Policy::template Registers<float, COUNT>;

  // The n-th group of rows; the next one, which `packed` holds, becomes bytes meanwhile.
  VITLR_HD void step(Packed& packed, int n) {
    const bool more = mine.begin + n + 1 < mine.end;
    p.wait(T::ready, n & 1);
    Sums sums;
    multiply(sums, n);
    if (more) {
      round(packed, n + 1);
      load(packed, n + 3);
    }
    p.template wait_products<0>(sums);
    if (more) p.arrive_warps(T::ready);  // so that who passes it knows that nobody multiplies the group before last
    if (kWarpgroupRows * w < sizes.r) finish(sums, n);
    p.arrive_warps(T::summed(n));
    if (w == 0) add(n);
  }

  VITLR_HD int row_of(int lane, int i) const { return (w * 4 + lane / 32) * T::each + i; }  // in a group
  VITLR_HD static int column_of(int lane, int part) { return part * kPart + lane % 32 * kEight; }

  // Rows of x on their way to registers.
  VITLR_HD void load(Packed& packed, int n) {
    if (mine.begin + n >= mine.end) return;
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < T::each; ++i) {
        const int m = (mine.begin + n) * N + row_of(lane, i);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int column = column_of(lane, part);
          p.load_eight(sizes.x, static_cast<int64_t>(m) * sizes.K + column, m < sizes.M && column < sizes.K,
                       packed(lane) + (i * kParts + part) * 4);
        }
      }
    });
  }

  // q of a warp's rows, and what their products need: s, and 1 / s₁ from the bound.
  VITLR_HD void round(Packed& packed, int n) {
#pragma unroll
    for (int i = 0; i < T::each; ++i) {
      Row x;
      p.lanes([&](int lane) {
#pragma unroll
        for (int j = 0; j < 4 * kParts; ++j) {
          const auto two = Policy::two_numbers(packed(lane)[i * 4 * kParts + j], Type{});
          x(lane)[2 * j] = two.x;
          x(lane)[2 * j + 1] = two.y;
        }
      });
      if (sizes.gamma != nullptr) normalise(x);
      Found<1> largest, total;
      p.lanes([&](int lane) {
        float most = 0, sum = 0;
#pragma unroll
        for (int j = 0; j < kEight * kParts; ++j) {
          most = fmaxf(most, fabsf(x(lane)[j]));
          sum = fmaf(x(lane)[j], x(lane)[j], sum);
        }
        largest(lane)[0] = most;
        total(lane)[0] = sum;
      });
      p.most_of_warps(largest);
      p.add_warps(total);
      p.lanes([&](int lane) {
        const float squares = total(lane)[0];
        const fp8::Scale own = fp8::scale_of(largest(lane)[0] + 0 * squares);  // a maximum passes over NaN
        const int row = row_of(lane, i), byte = lane % 32 * kEight;
        // A part is two panels, whose swizzle is the same.
        const int panel = T::q(n) + byte / kPanelBytes * T::q_panel;
        const uint32_t at = lowrank::panel_address(panel, row, byte % kPanelBytes / 2);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint32_t bytes[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float* v = x(lane) + part * kEight + 4 * half;
            const uint32_t low = Policy::bytes(v[0] * own.inverse, v[1] * own.inverse);
            const uint32_t high = Policy::bytes(v[2] * own.inverse, v[3] * own.inverse);
            bytes[half] = low | high << 16;
          }
          p.store_two(at + part * (kPart / kPanelBytes) * T::q_panel, bytes[0], bytes[1]);
        }
        if (lane % 32) return;
        const fp8::Scale next = fp8::scale_of(Policy::square_root(squares) * sizes.reach[0] + sizes.reach[1]);
        p.store_two(T::fact(n, row), fp8::bits_of(own.s), fp8::bits_of(next.inverse));
        const int m = (mine.begin + n) * N + row;
        if (m < sizes.M) sizes.y_scale[m] = next.s;
      });
    }
    p.fence_async();  // products read what was written here
  }

  // LayerNorm of a row; columns beyond K stay zero.
  VITLR_HD void normalise(Row& x) {
    Found<1> sum;
    p.lanes([&](int lane) {
      sum(lane)[0] = 0;
#pragma unroll
      for (int j = 0; j < kEight * kParts; ++j) sum(lane)[0] += x(lane)[j];
    });
    p.add_warps(sum);
    p.lanes([&](int lane) {
      const float mean = sum(lane)[0] / sizes.K;
      float squares = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float less = column_of(lane, part) < sizes.K ? mean : 0;
#pragma unroll
        for (int j = part * kEight; j < (part + 1) * kEight; ++j) {
          x(lane)[j] -= less;
          squares = fmaf(x(lane)[j], x(lane)[j], squares);
        }
      }
      sum(lane)[0] = squares;
    });
    p.add_warps(sum);
    p.lanes([&](int lane) {
      const float by = 1 / Policy::square_root(sum(lane)[0] / sizes.K + sizes.eps);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t gamma[4], beta[4];
        const int column = column_of(lane, part);
        p.load_eight(sizes.gamma, column, column < sizes.K, gamma);
        p.load_eight(sizes.beta, column, column < sizes.K, beta);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto g = Policy::two_numbers(gamma[j], Type{}), b = Policy::two_numbers(beta[j], Type{});
          float* two = x(lane) + part * kEight + 2 * j;
          two[0] = fmaf(two[0] * by, g.x, b.x);
          two[1] = fmaf(two[1] * by, g.y, b.y);
        }
      }
    });
  }

  // pᵀ = W qᵀ, not waited for.
  VITLR_HD void multiply(Sums& sums, int n) {
    uint64_t W = lowrank::descriptor(p.address(T::W + T::first(w) * lowrank::kPanelRowBytes));
    uint64_t q = lowrank::descriptor(p.address(T::q(n)));
#pragma unroll 1
    for (int k = 0; k < ceil_div(sizes.K, kPanelBytes); ++k) {
      p.wait(T::full(k), 0);  // passes at once after the first group
      p.fence_registers(sums);
#pragma unroll
      for (int i = 0; i < kPanelBytes / kDepth; ++i)
        p.template multiply_bytes<N>(sums, lowrank::advanced(W, i * kDepth), lowrank::advanced(q, i * kDepth),
                                     k > 0 || i > 0);
      p.commit();
      W = lowrank::advanced(W, T::W_panel);
      q = lowrank::advanced(q, T::q_panel);
    }
  }

  // p to bytes, turned round in shared memory, to memory; sums of squares of its rows over this warpgroup's columns.
  VITLR_HD void finish(Sums& sums, int n) {
    const int before = kWarpgroupRows * w - T::first(w);  // rows of W that are another warpgroup's
    Made made;
    Squares squares;
    p.lanes([&](int lane) {
      float scale[2], bias[2];  // of both rows of W; zero where they do not count
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lowrank::accumulator_row(lane, 2 * i), column = T::first(w) + row;
        const bool counts = row >= before && column < sizes.r;
        scale[i] = counts ? sizes.scale[column] : 0;
        bias[i] = counts && sizes.bias != nullptr ? sizes.bias[column] : 0;
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        float fact[4], square[2] = {0, 0};  // s and 1 / s₁ of two rows of x
        p.load_shared(T::fact(n, lowrank::accumulator_column(lane, 4 * j)), fact);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* v = sums(lane) + 4 * j + 2 * i;
          const float p0 = fmaf(v[0] * fact[0], scale[i], bias[i]), p1 = fmaf(v[1] * fact[2], scale[i], bias[i]);
          square[0] = fmaf(p0, p0, square[0]);
          square[1] = fmaf(p1, p1, square[1]);
          made(lane)[2 * j + i] = Policy::bytes(p0 * fact[1], p1 * fact[3]);
        }
        squares(lane)[2 * j] = square[0];
        squares(lane)[2 * j + 1] = square[1];
      }
    });
    p.add_eights(squares);
    p.once([&] { p.template wait_stores<0>(); });  // the last group left from there
    p.synchronise(w);
    p.lanes([&](int lane) {
      if (lane % 32 >= 4) return;
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float* two = squares(lane) + 2 * j;
        p.store_two(T::stage(w) + (lane / 32 * N + lowrank::accumulator_column(lane, 4 * j)) * 4, fp8::bits_of(two[0]),
                    fp8::bits_of(two[1]));
      }
    });
    p.synchronise(w);
    p.lanes([&](int lane) {
      if (lane >= N) return;
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += fp8::float_of(p.load_shared(T::stage(w) + (warp * N + lane) * 4));
      p.store_shared(T::total(n, w, lane), fp8::bits_of(sum));
    });
    p.synchronise(w);
    p.lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lowrank::accumulator_column(lane, 0), column = lowrank::accumulator_row(lane, 2 * i) - before;
        if (column < 0) continue;
        const uint32_t at = lowrank::swizzled<kWarpgroupRows>(T::stage(w) + row * kWarpgroupRows + column);
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)  // the swizzle is that of pairs of rows, and the same eight rows on
            p.store_byte(at + (8 * j + e) * kWarpgroupRows, static_cast<uint8_t>(made(lane)[2 * j + i] >> 8 * e));
      }
    });
    p.fence_async();  // TMA reads what was written here
    p.synchronise(w);
    p.once([&] {
      p.store(maps.y, T::stage(w), w * kWarpgroupRows / 2, (mine.begin + n) * N);
      p.commit_stores();
    });
  }

  // Sums of squares of whole rows, in the order of warpgroups.
  VITLR_HD void add(int n) {
    p.wait(T::summed(n), n / 2 & 1);
    p.lanes([&](int lane) {
      const int m = (mine.begin + n) * N + lane;
      if (lane >= N || m >= sizes.M) return;
      float sum = 0;
#pragma unroll 1
      for (int other = 0; other < ceil_div(sizes.r, kWarpgroupRows); ++other)
        sum += fp8::float_of(p.load_shared(T::total(n, other, lane)));
      sizes.y_squares[m] = sum;
    });
  }

  Policy& p;
  const Sizes& sizes;
  const Maps<typename Policy::Map>& maps;
  const int w;
  const lowrank::Range mine;  // groups of this CTA
};

}  // namespace vitlr::cuda::fp8_first
