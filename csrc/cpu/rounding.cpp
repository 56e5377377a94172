// A tile takes as long as its entries do one after the other, about 100 ns each: one loop in portable code, whose inner
// loops every compiler turns into vectors.
#include "cpu/rounding.h"

#include <algorithm>

namespace vitlr {
namespace {

constexpr double kWhole = 6755399441055744.0;  // 1.5 * 2^52: a number added to it keeps no digit behind the point

double nearest(double x) { return (x + kWhole) - kWhole; }

// y[l] += a x[l]
void add_multiple(double* y, double a, const double* x, int64_t n) {
  for (int64_t l = 0; l < n; ++l) y[l] += a * x[l];
}

}  // namespace

void round_tile(const RoundingTile& t) {
  for (int64_t i = t.height - 1; i >= 0; --i) {
    const int64_t row = i * t.stride;
    double *r = t.by_row + i * t.width, *f = t.F + row;
    const double *c = t.by_column + row, *least = t.least + i * t.least_stride, *most = t.largest + i * t.largest_stride;
    for (int64_t j = t.width - 1; j >= 0; --j) {
      const double w = t.W[row + j], s = t.step[row + j];
      const double q = nearest(std::min(std::max((w - r[j] - c[j]) / s, least[j]), most[j]));
      const double e = q * s - w;
      t.codes[row + j] = q, t.E[row + j] = e, f[j] = e + r[j], t.A[row + j] = f[j] + c[j];
      add_multiple(r, e, t.columns + j * t.columns_stride, j);
    }
    for (int64_t k = 0; k < i; ++k) add_multiple(t.by_column + k * t.stride, t.rows[i * t.rows_stride + k], f, t.width);
  }
}

}  // namespace vitlr
