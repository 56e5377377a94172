// What the low-rank kernels for Hopper are called with, the boxes in which their tensors are moved, and the plan by
// which a shape runs. Everything but the launches is plain C++: the emulation of tests/csrc takes the same.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/lowrank_tile.h"

namespace vitlr::cuda::lowrank {

// A row-major matrix of 16-bit values; its rows are `stride` elements apart.
struct Matrix {
  const void* data;
  int64_t stride;
};

// y [M, N] contiguous; residual, b1, b2 may be null. lowrank_linear: A1 and B2 null, D 0, B1 is B, A2 is A, b2 the
// bias.
struct LowrankParams {
  Matrix x, B1, A1, B2, A2, residual;
  const void* b1;
  const void* b2;
  void* y;
  int M, K, D, N, r1, r2;
  Act act;
  bool fp16;

  bool mlp() const { return D > 0; }
};

// A tile, CTAs of a cluster, clusters, clusters a row block; µs by the model below. R is 0 where nothing fits.
struct Plan {
  int R, warpgroups, ranks, clusters, groups;
  double microseconds;
};

// The tiles that are compiled, rows a warpgroup first: few rows take one warpgroup. f(Tile<R, WARPGROUPS>{}).
template <bool MLP, class F>
void each_tile(F f) {
  f(Tile<64, 1>{});
  f(Tile<128, 1>{});
  f(Tile<192, 1>{});
  if constexpr (MLP) {
    f(Tile<64, 3>{});
    f(Tile<128, 3>{});
    f(Tile<192, 2>{});
    f(Tile<256, 2>{});
  } else {
    f(Tile<256, 1>{});
  }
}

constexpr double kMultiplyAdds = 790e12 / 2 / 132 * 1e-6;  // a processor and µs, measured on an H200 over all of it
constexpr double kBytes = 4.3e12 * 1e-6;                   // of device memory a µs
constexpr double kClocks = 1755;                           // a µs
constexpr double kInstructions = 15.5;  // an element: GELU, its bias, half a conversion, as counted in the SASS
constexpr double kSharedBytes = 25e3;   // of distributed shared memory a processor and µs: published, not measured here
constexpr double kHandshake = 1.5, kFill = 1.0;  // µs: three waits on other CTAs, the first panels of an item

// µs of a shape with a tile: whole waves of items. A guess that ranks plans; nothing depends on it being right.
template <class T>
double modelled(const LowrankParams& p, int ranks, int clusters, int groups) {
  const double rows = T::rows, R = T::R;
  const int hidden_tiles = p.mlp() ? ceil_div(ceil_div(p.D, T::hidden), ranks) : 0;
  const double depth = p.mlp() ? p.K : ceil_div(ceil_div(p.K, kPanelColumns), ranks) * kPanelColumns;
  const double columns = ceil_div(ceil_div(p.N, kColumns), ranks * groups) * kColumns;
  const double products = hidden_tiles * T::hidden * rows * 2 * R / kMultiplyAdds;
  const double issued = hidden_tiles * T::hidden * rows * kInstructions / 128 / kClocks;
  const double middle = T::WARPGROUPS > 1 ? std::max(products, issued) : products + issued;
  const double exchanged = rows * R * (4 + 2) * (ranks - 1) / ranks / kSharedBytes + kHandshake;
  const double item = kFill + depth * rows * R / kMultiplyAdds + middle + (ranks > 1 ? exchanged : 0) +
                      columns * rows * R / kMultiplyAdds;
  const int items = ceil_div(p.M, T::rows) * groups;
  const double bytes = 2.0 * p.M * (p.K + p.N * (p.residual.data ? 2.0 : 1.0));
  return std::max(ceil_div(items, clusters) * item, bytes / kBytes);
}

// The quickest tile, cluster and number of groups by the model, the smaller cluster where equal.
inline Plan plan(const LowrankParams& p, int processors) {
  Plan best{0, 0, 0, 0, 0, std::numeric_limits<double>::infinity()};
  const int largest = std::max(p.r1, p.r2);
  const auto consider = [&](auto tile) {
    using T = decltype(tile);
    if (T::R < largest || T::R - largest >= kPanelColumns) return;
    for (int ranks = 1; ranks <= kMostRanks; ranks *= 2) {
      // Every CTA needs something to add up, and a cluster of more than two leaves processors of its group idle.
      if (ranks > (p.mlp() ? ceil_div(p.D, T::hidden) : ceil_div(p.K, kPanelColumns))) continue;
      const int room = std::max(1, (ranks <= 2 ? processors : processors * 9 / 10) / ranks);
      const int blocks = std::max(1, ceil_div(p.M, T::rows));
      for (int groups = 1; groups == 1 || (!p.mlp() && groups * ranks <= ceil_div(p.N, kColumns)); groups *= 2) {
        const int clusters = std::min(room, blocks * groups);
        const double time = modelled<T>(p, ranks, clusters, groups);
        if (time < best.microseconds) best = {T::R, T::WARPGROUPS, ranks, clusters, groups, time};
      }
    }
  };
  if (p.mlp())
    each_tile<true>(consider);
  else
    each_tile<false>(consider);
  return best;
}

// Why a plan that was asked for by its numbers cannot run a shape; empty where it can.
inline std::string objection(const LowrankParams& p, const Plan& plan) {
  const auto number = [](int value) { return std::to_string(value); };
  const int largest = std::max(p.r1, p.r2);
  int shares = 0;  // a CTA without one would wait for ever
  const auto note = [&](auto tile) {
    using T = decltype(tile);
    if (T::R == plan.R && T::WARPGROUPS == plan.warpgroups)
      shares = p.mlp() ? ceil_div(p.D, T::hidden) : ceil_div(p.K, kPanelColumns);
  };
  if (p.mlp())
    each_tile<true>(note);
  else
    each_tile<false>(note);
  if (shares == 0) return "no tile of rank " + number(plan.R) + " with " + number(plan.warpgroups) + " warpgroups is compiled";
  if (plan.R < largest) return "a tile of rank " + number(plan.R) + " does not hold ranks up to " + number(largest);
  if (plan.ranks < 1 || plan.ranks > kMostRanks || (plan.ranks & (plan.ranks - 1)))
    return number(plan.ranks) + " CTAs a cluster, expected 1, 2, 4 or 8";
  if (plan.ranks > shares)
    return number(plan.ranks) + " CTAs a cluster share " + number(shares) + " steps, expected at least one each";
  if (plan.clusters < 1 || plan.clusters > (1 << 20)) return number(plan.clusters) + " clusters, expected 1 to 2^20";
  if (plan.groups < 1 || (p.mlp() && plan.groups > 1))
    return number(plan.groups) + " groups, expected " + (p.mlp() ? "1, as of every MLP" : "at least 1");
  if (plan.groups > 1 && plan.groups * plan.ranks > ceil_div(p.N, kColumns))
    return number(plan.groups * plan.ranks) + " CTAs share " + number(ceil_div(p.N, kColumns)) + " tiles of output";
  return "";
}

inline Sizes sizes_of(const LowrankParams& p, const Plan& plan) {
  const int rows = plan.warpgroups * kWarpgroupRows;
  return {p.M, p.K, p.D, p.N, p.r1, p.r2, p.act, p.residual.data != nullptr, ceil_div(p.M, rows) * plan.groups,
          plan.groups, p.b1, p.b2};
}

// encode(matrix, rows, columns, box rows, box columns) -> Map. A tensor that is not there takes the place of x: its map
// is never used.
template <class T, class Map, class Encode>
Maps<Map> maps_of(const LowrankParams& p, Encode encode) {
  const auto optional = [&](const Matrix& matrix, int rows, int columns, int box_rows, int box_columns) {
    return matrix.data ? encode(matrix, rows, columns, box_rows, box_columns)
                       : encode(p.x, p.M, p.K, T::rows, kPanelColumns);
  };
  return {encode(p.x, p.M, p.K, T::rows, kPanelColumns),
          encode(p.B1, p.r1, p.K, T::R, kPanelColumns),
          optional(p.A1, p.D, p.r1, T::hidden, kPanelColumns),
          optional(p.B2, p.r2, p.D, T::R, T::value_columns),
          encode(p.A2, p.N, p.r2, kColumns, kPanelColumns),
          optional(p.residual, p.M, p.N, T::rows, kPanelColumns),
          encode(Matrix{p.y, p.N}, p.M, p.N, kWarpgroupRows, kPanelColumns)};
}

// The launches, one a source so that they compile side by side; `stream` is a cudaStream_t.
void launch_mlp_bf16(const LowrankParams&, const Plan&, void* stream);
void launch_mlp_fp16(const LowrankParams&, const Plan&, void* stream);
void launch_linear(const LowrankParams&, const Plan&, void* stream);

}  // namespace vitlr::cuda::lowrank
