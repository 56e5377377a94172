// The micro-kernel of the Gram update, compiled once for each instruction set (VITLR_ISA, see setup.py).
//
// A tile of ROWS x PANEL of C lives in registers while t runs over the depth: one row of the packed panel j is loaded,
// ROWS scalars of the columns i are broadcast, all from the same packed copy of X. GCC/Clang vector extensions give
// the same source SSE, AVX2, AVX-512 or NEON.
#include "cpu/gram.h"

#if defined(__AVX512F__)
#define VITLR_BYTES 64  // a tile of 24 x 16: 24 accumulators of 32 registers
#define VITLR_VECTORS 1
#define VITLR_STEP 8
#define VITLR_CHUNKS 3
#elif defined(__AVX2__)
#define VITLR_BYTES 32  // a tile of 6 x 16: 12 accumulators of 16 registers
#define VITLR_VECTORS 2
#define VITLR_STEP 2
#define VITLR_CHUNKS 3
#elif defined(__aarch64__)
#define VITLR_BYTES 16  // a tile of 8 x 8: 16 accumulators of 32 registers
#define VITLR_VECTORS 2
#define VITLR_STEP 4
#define VITLR_CHUNKS 2
#else
#define VITLR_BYTES 16  // a tile of 4 x 8: 8 accumulators of 16 registers
#define VITLR_VECTORS 2
#define VITLR_STEP 4
#define VITLR_CHUNKS 1
#endif

namespace vitlr {
namespace {

typedef float Vector __attribute__((vector_size(VITLR_BYTES)));

constexpr int64_t kLanes = VITLR_BYTES / sizeof(float);
constexpr int kVectors = VITLR_VECTORS;
constexpr int kStep = VITLR_STEP;
constexpr int64_t kPanel = kLanes * kVectors;
constexpr int64_t kRows = kStep * VITLR_CHUNKS;
static_assert(kPanel % kStep == 0, "a chunk of rows must not straddle two panels");

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }

template <int CHUNKS>
inline void tile(const float* packed, int64_t depth, int64_t limit, int64_t i, int64_t j, double* C, int64_t stride) {
  constexpr int ROWS = CHUNKS * kStep;
  const float* b = packed + j * depth;  // panel j / kPanel, and j is a multiple of kPanel
  const float* a[CHUNKS];
  for (int c = 0; c < CHUNKS; ++c) {
    const int64_t row = i + c * kStep;
    a[c] = packed + row / kPanel * kPanel * depth + row % kPanel;
  }
  Vector sum[ROWS][kVectors] = {};
  for (int64_t t = 0; t < depth; ++t) {
    Vector x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + t * kPanel + v * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
      const float y = a[r / kStep][t * kPanel + r % kStep];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += y * x[v];
    }
  }
  alignas(VITLR_BYTES) float flush[ROWS][kPanel];  // lanes of a register are slow to reach one by one
#pragma GCC unroll 32
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(&flush[r][v * kLanes]) = sum[r][v];
  const int64_t rows = limit - i < ROWS ? limit - i : ROWS;
  const int64_t columns = limit - j < kPanel ? limit - j : kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    double* c = C + (i + r) * stride + j;
    if (columns == kPanel)
      for (int64_t l = 0; l < kPanel; ++l) c[l] += static_cast<double>(flush[r][l]);
    else
      for (int64_t l = 0; l < columns; ++l) c[l] += static_cast<double>(flush[r][l]);
  }
}

void tiles(const float* packed, int64_t depth, int64_t columns, int64_t begin, int64_t end, int64_t panel, double* C,
           int64_t stride) {
  const int64_t j = panel * kPanel;
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) tile<VITLR_CHUNKS>(packed, depth, columns, i, j, C, stride);
#if VITLR_CHUNKS > 2
  for (; i + 2 * kStep <= end; i += 2 * kStep) tile<2>(packed, depth, columns, i, j, C, stride);
#endif
#if VITLR_CHUNKS > 1
  for (; i < end; i += kStep) tile<1>(packed, depth, columns, i, j, C, stride);
#endif
}

void pack(const float* X, int64_t row_stride, int64_t column_stride, const float* weight, int64_t columns,
          int64_t depth, float* packed) {
  for (int64_t t = 0; t < depth; ++t) {
    const float s = weight ? __builtin_sqrtf(weight[t]) : 1.0f;
    const float* x = X + t * row_stride;
    float* out = packed + t * kPanel;
    int64_t j = 0;
    if (column_stride == 1)
      for (; j + kPanel <= columns; j += kPanel, out += depth * kPanel)
        for (int64_t c = 0; c < kPanel; ++c) out[c] = x[j + c] * s;
    for (; j < columns; j += kPanel, out += depth * kPanel)
      for (int64_t c = 0; c < kPanel; ++c) out[c] = j + c < columns ? x[(j + c) * column_stride] * s : 0.0f;
  }
}

}  // namespace

#define VITLR_JOIN(a, b) a##b
#define VITLR_NAME(isa) VITLR_JOIN(kernel_, isa)
#define VITLR_TEXT(isa) VITLR_STRING(isa)
#define VITLR_STRING(isa) #isa

const GramKernel& VITLR_NAME(VITLR_ISA)() {
  static constexpr GramKernel kernel = {VITLR_TEXT(VITLR_ISA), kPanel, kRows, pack, tiles};
  return kernel;
}

}  // namespace vitlr
