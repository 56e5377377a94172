// Batched blocked Cholesky and substitution in fp64, left-looking, panels of 64 columns: `F + shift 1 = L Lᵀ`, the
// inverses of L's diagonal blocks along with it, and `L⁻ᵀ U` by them. Per panel two launches: the diagonal block of every
// matrix (factor_block), then all blocks below it (substitution_block), each one product and one multiplication by
// the inverse. Inverses of 64 x 64 triangles instead of substitution row by row: the usual way on a GPU, backward stable
// for blocks that are not worse conditioned than the whole.
#pragma once

#include "cuda/chain_product.h"

namespace vitlr::cuda {

constexpr int kPanel = Narrow::BM;
constexpr int kLeading = kPanel + Narrow::PAD;  // of a 64 x 64 block in shared memory
constexpr int kBlocks = 2 * kPanel * kLeading;  // doubles: two such blocks
constexpr int kCholeskyShared = Narrow::SHARED > kBlocks ? Narrow::SHARED : kBlocks;
static_assert(Narrow::BN == kPanel, "panels are square");

struct Cholesky {
  Matrix F, L;          // [batch, n, n]; the lower triangle of F is read, all of L is written
  double* inverse;      // [batch, panels, 64, 64]
  const double* shift;  // [batch]
  int32_t* info;        // [batch], zero before: 1 + the column of a pivot that is not positive and finite, or 0
  int64_t batch, n;
};

VITLR_HD int64_t panels(int64_t n) { return ceil_div<int64_t>(n, kPanel); }

// The diagonal block of a panel, for matrix b: S = F - Σ L Lᵀ, S = L Lᵀ and L⁻¹, one column a step. Rows and columns beyond
// n are those of the identity.
template <class Block>
VITLR_HD void factor_block(Block& block, const Cholesky& p, int64_t panel, int64_t b, double* shared) {
  using T = Narrow;
  const int64_t origin = panel * kPanel, rows = p.n - origin;
  const Operand X{p.L.at + b * p.L.batch + origin * p.L.row, p.L.row, p.L.column, rows};
  typename Block::template PerThread<Accumulator<T>> acc;
  clear<T>(block, acc);
  multiply<T>(block, X, X, 0, origin, shared, acc);
  double *const S = shared, *const D = shared + kPanel * kLeading;
  const double* const F = p.F.at + b * p.F.batch + origin * (p.F.row + p.F.column);
  block.each([&](int thread) {
    for_each<T>(thread, acc[thread], [&](int m, int n, double sum) {
      double s = m == n ? 1 : 0;
      if (m < rows && n < rows && n <= m) {
        s = F[m * p.F.row + n * p.F.column] - sum;
        if (m == n) s += p.shift[b];
      }
      S[m * kLeading + n] = s;
      D[m * kLeading + n] = m == n ? 1 : 0;
    });
  });
  block.sync();
  for (int c = 0; c < kPanel; ++c) {
    typename Block::template PerThread<double> scale;
    block.each([&](int thread) {
      const double pivot = S[c * kLeading + c];
      const bool fails = !(pivot > 0 && pivot - pivot == 0);  // NaN and Inf, too
      scale[thread] = fails ? 1 : 1 / square_root(pivot);
      if (fails && thread == 0 && p.info[b] == 0) p.info[b] = static_cast<int32_t>(origin + c + 1);
    });
    block.sync();  // all have read the pivot
    block.each([&](int thread) {
      for (int e = thread; e < kPanel; e += T::THREADS) {
        if (e >= c) S[e * kLeading + c] *= scale[thread];
        if (e <= c) D[c * kLeading + e] *= scale[thread];
      }
    });
    block.sync();
    // Column c of L and row c of its inverse are final; take them out of what is below.
    block.each([&](int thread) {
      for (int e = thread; e < (kPanel - 1 - c) * kPanel; e += T::THREADS) {
        const int m = c + 1 + e / kPanel, n = e % kPanel;
        const double l = S[m * kLeading + c];
        if (n <= c)
          D[m * kLeading + n] -= l * D[c * kLeading + n];
        else if (n <= m)
          S[m * kLeading + n] -= l * S[n * kLeading + c];
      }
    });
    block.sync();
  }
  double* const L = p.L.at + b * p.L.batch + origin * (p.L.row + p.L.column);
  double* const inverse = p.inverse + (b * panels(p.n) + panel) * kPanel * kPanel;
  block.each([&](int thread) {
    for (int e = thread; e < kPanel * kPanel; e += T::THREADS) {
      const int m = e / kPanel, n = e % kPanel;
      inverse[e] = n <= m ? D[m * kLeading + n] : 0;
      if (m < rows && n < rows) L[m * p.L.row + n * p.L.column] = n <= m ? S[m * kLeading + n] : 0;
    }
  });
}

// out = (base - X Y) Z for rows of a matrix and the columns of a panel: X [M, K], Y [K, width], Z [64, 64], width <= 64.
// Cholesky below the diagonal block: base = F, X and Yᵀ rows of L, Z = D⁻ᵀ. Substitution from the right.
struct Substitution {
  Matrix X, Y, Z, base, out, zero;  // zero: where zeros go, width x M, or nowhere
  int64_t batch, M, first, last, width;
};

template <class Block>
VITLR_HD void substitution_block(Block& block, const Substitution& p, int64_t index, double* shared) {
  using T = Narrow;
  const int64_t count = ceil_div<int64_t>(p.M, T::BM), b = index / count, row = index % count * T::BM;
  const Operand X{p.X.at + b * p.X.batch + row * p.X.row, p.X.row, p.X.column, p.M - row};
  const Operand Y{p.Y.at + b * p.Y.batch, p.Y.column, p.Y.row, p.width};
  typename Block::template PerThread<Accumulator<T>> acc;
  clear<T>(block, acc);
  multiply<T>(block, X, Y, p.first, p.last, shared, acc);
  double *const rest = shared, *const Z = shared + kPanel * kLeading;
  const double* const base = p.base.at + b * p.base.batch + row * p.base.row;
  const double* const z = p.Z.at + b * p.Z.batch;
  block.each([&](int thread) {
    for_each<T>(thread, acc[thread], [&](int m, int n, double sum) {
      const bool inside = row + m < p.M && n < p.width;
      rest[m * kLeading + n] = inside ? base[m * p.base.row + n * p.base.column] - sum : 0;
    });
    for (int e = thread; e < kPanel * kPanel; e += T::THREADS)
      Z[e % kPanel * kLeading + e / kPanel] = z[e / kPanel * p.Z.row + e % kPanel * p.Z.column];  // by column, then depth
  });
  block.sync();
  clear<T>(block, acc);
  contract<T, kPanel>(block, Staged{rest, kLeading, 1}, Staged{Z, kLeading, 1}, acc);
  double* const out = p.out.at + b * p.out.batch + row * p.out.row;
  double* const zero = p.zero.at == nullptr ? nullptr : p.zero.at + b * p.zero.batch + row * p.zero.column;
  block.each([&](int thread) {
    for_each<T>(thread, acc[thread], [&](int m, int n, double sum) {
      if (row + m >= p.M || n >= p.width) return;
      out[m * p.out.row + n * p.out.column] = sum;
      if (zero != nullptr) zero[n * p.zero.row + m * p.zero.column] = 0;
    });
  });
}

VITLR_HD Matrix moved(const Matrix& from, int64_t i, int64_t j) {
  return {from.at + i * from.row + j * from.column, from.batch, from.row, from.column};
}
VITLR_HD Matrix transposed(const Matrix& from) { return {from.at, from.batch, from.column, from.row}; }

// The blocks below the diagonal block of a panel, once that is factored.
VITLR_HD Substitution below(const Cholesky& p, int64_t panel) {
  const int64_t origin = panel * kPanel, next = origin + kPanel, size = kPanel * kPanel;
  const Matrix inverse{p.inverse + panel * size, panels(p.n) * size, kPanel, 1};
  return {moved(p.L, next, 0),
          transposed(moved(p.L, origin, 0)),
          transposed(inverse),
          moved(p.F, next, origin),
          moved(p.L, next, origin),
          moved(p.L, origin, next),
          p.batch,
          p.n - next,
          0,
          origin,
          kPanel};
}

// P = L⁻ᵀ U, U and P [batch, n, columns], one panel of rows a launch, from the last one up: Pᵀ L = Uᵀ.
struct BackSubstitution {
  Matrix L, U, P;
  double* inverse;
  int64_t batch, n, columns;
};

VITLR_HD Substitution back(const BackSubstitution& p, int64_t panel) {
  const int64_t origin = panel * kPanel, next = origin + kPanel, size = kPanel * kPanel;
  return {transposed(p.P),
          moved(p.L, 0, origin),
          {p.inverse + panel * size, panels(p.n) * size, kPanel, 1},
          transposed(moved(p.U, origin, 0)),
          transposed(moved(p.P, origin, 0)),
          {},
          p.batch,
          p.columns,
          next < p.n ? next : p.n,
          p.n,
          p.n - origin < kPanel ? p.n - origin : kPanel};
}

}  // namespace vitlr::cuda
