// Rounds tiles over ragged shapes and strides and holds every entry to the formulas of cpu/rounding.h; buffers are exactly
// as large as what lies in them, so that AddressSanitizer sees a read or write beside them. Built and run by
// test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/rounding.h"

using namespace vitlr;

namespace {

std::mt19937 generator(0);

int64_t pick(int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(generator); }

// [rows, columns] at a stride, the last row without what would follow it.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t stride)
      : stride(stride), data(new double[(rows - 1) * stride + columns]) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < (rows - 1) * stride + columns; ++i) data[i] = normal(generator);
  }
  double& operator()(int64_t i, int64_t j) const { return data[i * stride + j]; }
  int64_t stride;
  std::unique_ptr<double[]> data;
};

bool check() {
  const int64_t m = pick(64), n = pick(64), stride = n + pick(9) - 1;
  const Matrix W(m, n, stride), step(m, n, stride), rows(m, m, m + 3), columns(n, n, n + 1), by_row(m, n, n);
  const Matrix by_column(m, n, stride), E(m, n, stride), F(m, n, stride), A(m, n, stride), codes(m, n, stride);
  const Matrix least(1, n, 0), largest(m, n, n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      step(i, j) = 0.1 + std::fabs(step(i, j));
      if (i == 0) least(0, j) = -double(pick(9));
      largest(i, j) = double(pick(9));
    }
  std::vector<double> beside(m * n), below(m * n);  // what came in, before it is used up
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) beside[i * n + j] = by_row(i, j), below[i * n + j] = by_column(i, j);
  round_tile({m, n, W.data.get(), step.data.get(), least.data.get(), largest.data.get(), rows.data.get(),
              columns.data.get(), by_row.data.get(), by_column.data.get(), E.data.get(), F.data.get(), A.data.get(),
              codes.data.get(), stride, least.stride, largest.stride, rows.stride, columns.stride});
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double r = beside[i * n + j], c = below[i * n + j];
      for (int64_t l = j + 1; l < n; ++l) r += E(i, l) * columns(l, j);
      for (int64_t k = i + 1; k < m; ++k) c += rows(k, i) * F(k, j);
      const double q = codes(i, j), wanted = (W(i, j) - r - c) / step(i, j);
      const double held = std::fmin(std::fmax(wanted, least(0, j)), largest(i, j)), near = 1e-6 * (1 + std::fabs(wanted));
      const bool right = q == std::floor(q) && q >= least(0, j) && q <= largest(i, j) && std::fabs(q - held) <= 0.5 + near &&
                         std::fabs(E(i, j) - (q * step(i, j) - W(i, j))) <= near &&
                         std::fabs(F(i, j) - E(i, j) - r) <= near * (1 + std::fabs(r)) &&
                         std::fabs(A(i, j) - F(i, j) - c) <= near * (1 + std::fabs(c));
      if (!right) {
        std::printf("[%ld, %ld] of %ld x %ld: %g where %g was wanted\n", long(i), long(j), long(m), long(n), q, wanted);
        return false;
      }
    }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  for (int round = 0; round < rounds; ++round)
    if (!check()) return 1;
  std::printf("checked up to 64 x 64\n");
}
