// Batched products in fp64: any strides, one triangle of a symmetric result, and triangular operands whose zeros are
// passed over. `W C Wᵀ` is two of them, the second one symmetric; `Lᵀ M L` is the same with L's triangle known.
#pragma once

#include "cuda/chain_tiles.h"

namespace vitlr::cuda {

// Entry (i, j) of matrix b of a batch: at[b * batch + i * row + j * column].
struct Matrix {
  double* at = nullptr;
  int64_t batch = 0, row = 0, column = 0;
};

// out = X Y: X [batch, M, K], Y [batch, K, N], out [batch, M, N].
struct Product {
  Matrix X, Y, out;
  int64_t batch, M, N, K;
  bool symmetric;    // out is: its lower triangle is computed, and stored twice
  bool upper_X;      // X[m, k] = 0 for k < m
  bool lower_Y;      // Y[k, n] = 0 for k < n
  bool upper_Y;      // Y[k, n] = 0 for k > n
};

// Tiles of one result, counted row by row: all of them, or those with j <= i.
template <class T>
VITLR_HD int64_t tile_count(const Product& p) {
  const int64_t rows = ceil_div<int64_t>(p.M, T::BM), columns = ceil_div<int64_t>(p.N, T::BN);
  return p.symmetric ? rows * (rows + 1) / 2 : rows * columns;
}

struct TileIndex {
  int64_t i, j;
};

template <class T>
VITLR_HD TileIndex tile_at(const Product& p, int64_t tile) {
  if (!p.symmetric) {
    const int64_t columns = ceil_div<int64_t>(p.N, T::BN);
    return {tile / columns, tile % columns};
  }
  int64_t i = 0;  // at most some dozen rows of tiles: exact, where a root would have to be corrected
  while ((i + 1) * (i + 2) / 2 <= tile) ++i;
  return {i, tile - i * (i + 1) / 2};
}

struct Depths {
  int64_t first, last;
};

// The depths at which tile (i, j) has anything to add.
template <class T>
VITLR_HD Depths depths(const Product& p, TileIndex t) {
  Depths d{0, p.K};
  if (p.upper_X && d.first < t.i * T::BM) d.first = t.i * T::BM;
  if (p.lower_Y && d.first < t.j * T::BN) d.first = t.j * T::BN;
  if (p.upper_Y && d.last > (t.j + 1) * T::BN) d.last = (t.j + 1) * T::BN;
  return d;
}

// Block `index` of a launch: one tile of one matrix.
template <class T, class Block>
VITLR_HD void product_block(Block& block, const Product& p, int64_t index, double* shared) {
  const int64_t count = tile_count<T>(p), b = index / count;
  const TileIndex t = tile_at<T>(p, index % count);
  const int64_t row = t.i * T::BM, column = t.j * T::BN;
  const Operand X{p.X.at + b * p.X.batch + row * p.X.row, p.X.row, p.X.column, p.M - row};
  const Operand Y{p.Y.at + b * p.Y.batch + column * p.Y.column, p.Y.column, p.Y.row, p.N - column};
  const Depths d = depths<T>(p, t);
  typename Block::template PerThread<Accumulator<T>> acc;
  clear<T>(block, acc);
  multiply<T>(block, X, Y, d.first, d.last, shared, acc);
  double* const out = p.out.at + b * p.out.batch;
  block.each([&](int thread) {
    for_each<T>(thread, acc[thread], [&](int m, int n, double sum) {
      const int64_t i = row + m, j = column + n;
      if (i >= p.M || j >= p.N || (p.symmetric && j > i)) return;  // both halves of a tile on the diagonal may differ
      out[i * p.out.row + j * p.out.column] = sum;
      if (p.symmetric && i != j) out[j * p.out.row + i * p.out.column] = sum;
    });
  });
}

// Whether tiles of 128 pay: in whole waves over the multiprocessors, small ones at three quarters of the speed, because
// they read twice as much from L2 for the same sums.
VITLR_HD bool prefers_wide(const Product& p, int64_t multiprocessors) {
  const int64_t wide = ceil_div(tile_count<Wide>(p) * p.batch, multiprocessors) * 4 * 3;
  return wide <= ceil_div(tile_count<Narrow>(p) * p.batch, multiprocessors) * 4;
}

}  // namespace vitlr::cuda
