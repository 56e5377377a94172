// Symmetric Gram update C += (X sqrt(w))^T (X sqrt(w)): fp32 products, fp64 accumulation, upper triangle of tiles only.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace vitlr {

// Rows of X whose products are summed in fp32 registers before one fp64 flush. The error grows with it (twice the
// depth, twice the error) whatever T is: 128 is as exact as the two fp32 chains of a vendor GEMM over 256 rows, and the
// flush still costs only some percent. A packed panel (128 x 16 floats) takes a quarter of a 32 KiB L1.
constexpr int64_t kDepth = 128;

// What one instruction set brings. Plain functions, no std types: these files are compiled with -mavx512f and the
// like, and an inline function shared with other files would be linked once, possibly as its AVX-512 version.
struct GramKernel {
  const char* name;
  int64_t panel;  // columns of X in one packed panel; also the width of a tile of C
  int64_t rows;   // most rows of C in one tile

  // packed[p][t][c] = X[t, p * panel + c] * sqrt(w[t]) for t < depth; X has `columns`, 0 is packed beyond them.
  void (*pack)(const float* X, int64_t row_stride, int64_t column_stride, const float* weight, int64_t columns,
               int64_t depth, float* packed);

  // C[i * stride + j] += sum_t packed[i] packed[j] for begin <= i < end and the columns j of one panel.
  // begin and end are multiples of `rows` or of `panel`; entries with i or j >= columns are not stored.
  void (*tiles)(const float* packed, int64_t depth, int64_t columns, int64_t begin, int64_t end, int64_t panel,
                double* C, int64_t stride);
};

const GramKernel& kernel_portable();
const GramKernel& kernel_avx2();
const GramKernel& kernel_avx512();

const GramKernel& gram_kernel(Isa isa);

// Where in a packed upper triangle, row after row, C[i, j] lies for j >= i: at triangle_row(i, n) + j.
inline int64_t triangle_row(int64_t i, int64_t n) { return i * n - i * (i + 1) / 2; }

// C += X^T diag(weight) X; X [T, n] with strides in elements, weight [T] >= 0 or null. C is [n, n] row-major, of which
// the upper triangle is read and both are written, or a packed upper triangle.
void gram_update(double* C, bool triangle, const float* X, int64_t T, int64_t n, int64_t row_stride,
                 int64_t column_stride, const float* weight, int threads, Isa isa);

}  // namespace vitlr
