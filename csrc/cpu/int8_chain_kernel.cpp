// The micro-kernels of chains of integers, compiled once for each instruction set (VITLR_ISA, see setup.py).
#include "cpu/activations.h"
#include "cpu/bytes.h"
#include "cpu/chain.h"
#include "cpu/packing.h"
#include "cpu/tile.h"

#if defined(__AMX_INT8__)
#include "cpu/amx.h"
#endif

namespace vitlr {
namespace {

#if defined(__AMX_INT8__)
constexpr int64_t kTileRows = 32;
#else
constexpr int64_t kTileRows = kRows;
#endif

// What a panel needs of its columns beside the weights; 0 where there is no column.
struct Columns {
  float scale[kColumns] = {}, bias[kColumns] = {}, multiplier[kColumns] = {}, shift[kColumns] = {};
  int64_t wide = 0, end = 0;  // of the next layer's `wide`, what lies in this panel
};

// The further columns e.. of the next layer, whose channels lie among those of v, n.. of row m.
inline void put_wide_of(const Panel& panel, int64_t m, int64_t n, int64_t e, int64_t count, Vector v) {
  float all[kLanes], values[kLanes] = {};
  store(all, v);
  for (int64_t l = 0; l < count; ++l) values[l] = all[panel.next_input.wide[e + l] - n];
  put_wide(panel.next, panel.rows, m, panel.weights[0]->N, panel.next_input, e, count, values);
}

// Columns n.. of `rows` rows: int32 sums to floats, activation, then bytes for the next layer, or residual and store.
template <class T, int ACT>
void finish(const Panel& panel, int64_t first, int64_t rows, const void* int32_sums, const Columns& columns, int64_t n,
            int64_t width) {
  const Word* sums = static_cast<const Word*>(int32_sums);
  int64_t wide = columns.wide;
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vector scale = load(columns.scale + c), bias = load(columns.bias + c);
    const Vector multiplier = load(columns.multiplier + c), shift = load(columns.shift + c);
    const int64_t from = wide;
    while (wide < columns.end && panel.next_input.wide[wide] < n + c + kLanes) ++wide;
    for (int64_t i = 0; i < rows; ++i) {
      const Vector sum = __builtin_convertvector((Integers)load(sums + i * kColumns + c), Vector);
      const Vector v = activate<ACT, T::bf16>(sum * scale + bias);
      if (!panel.next) {
        put_output<T>(panel, first + i, n + c, width - c, v);
        continue;
      }
      put_some_bytes(block_row<Int8>(panel.next, panel.rows, first + i, n + c), nearest_bytes(v * multiplier + shift),
                     width - c);
      for (int64_t e = from; e < wide; e += kLanes)
        put_wide_of(panel, first + i, n + c, e, smaller(kLanes, wide - e), v);
    }
  }
}

template <class T>
void finish(const Panel& panel, int64_t first, int64_t rows, const void* sums, const Columns& columns, int64_t n,
            int64_t width) {
  switch (panel.act) {
    case kNone: return finish<T, kNone>(panel, first, rows, sums, columns, n, width);
    case kGelu: return finish<T, kGelu>(panel, first, rows, sums, columns, n, width);
    case kGeluTanh: return finish<T, kGeluTanh>(panel, first, rows, sums, columns, n, width);
    case kSilu: return finish<T, kSilu>(panel, first, rows, sums, columns, n, width);
    case kRelu: return finish<T, kRelu>(panel, first, rows, sums, columns, n, width);
    case kSigmoid: return finish<T, kSigmoid>(panel, first, rows, sums, columns, n, width);
  }
}

template <class T>
void panel(const Panel& call) {
  const Weight& weight = *call.weights[0];
  const int64_t n = call.index * kColumns, width = smaller(kColumns, weight.N - n);
  const bool wide = width > kLanes;
  const int64_t words = stored_words(weight.K);
  const Word* panel = static_cast<const Word*>(weight.panels) + n * words;  // every panel before is of full width
  const Word* block = static_cast<const Word*>(call.blocks[0]);
  Columns columns;
  for (int64_t c = 0; c < width; ++c) {
    columns.scale[c] = weight.scales[n + c], columns.bias[c] = static_cast<const float*>(call.bias)[n + c];
    if (call.next)
      columns.multiplier[c] = call.next_input.multiplier[n + c], columns.shift[c] = call.next_input.shift[n + c];
  }
  if (call.next) {
    const Bytes& next = call.next_input;
    while (columns.wide < next.more && next.wide[columns.wide] < n) ++columns.wide;
    for (columns.end = columns.wide; columns.end < next.more && next.wide[columns.end] < n + width;) ++columns.end;
  }
#if defined(__AMX_INT8__)
  alignas(64) Word sums[kMostRows * kColumns];  // of int32
  multiply_block(block, call.rows, words, panel, sums, wide);
  finish<T>(call, 0, call.rows, sums, columns, n, width);
#else
  alignas(64) float sums[kTileRows * kColumns];  // of int32
  const int64_t tiles = (call.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - first;
    const Tile product = wide ? tile_of<Int8, 2>(rows) : tile_of<Int8, 1>(rows);
    product(block + first * kChunk, call.rows * kChunk, words, panel, sums, false);
    finish<T>(call, first, rows, sums, columns, n, width);
  }
#endif
}

int64_t packed_size(int64_t N, int64_t K, Form) { return stored_columns(N) * stored_words(K) * 4; }

double peak(int64_t rounds) {
#if defined(__AMX_INT8__)
  return peak_of_tiles(rounds);
#else
  return peak_of<Int8>(rounds);
#endif
}

#define VITLR_JOIN3(a, b, c) a##b##c
#define VITLR_NAME(dtype, isa) VITLR_JOIN3(int8_chain_, dtype, isa)
#define VITLR_STRING(isa) #isa
#define VITLR_TEXT(isa) VITLR_STRING(isa)

template <class T>
constexpr ChainKernel kernel() {
  return {VITLR_TEXT(VITLR_ISA), kColumns, kTileRows, Int8::elements, T::bytes, packed_size, pack_bytes, nullptr,
          fill_bytes<T>,         panel<T>, peak};
}

}  // namespace

const ChainKernel& VITLR_NAME(fp32_, VITLR_ISA)() {
  static constexpr ChainKernel table = kernel<Fp32>();
  return table;
}

const ChainKernel& VITLR_NAME(bf16_, VITLR_ISA)() {
  static constexpr ChainKernel table = kernel<Bf16>();
  return table;
}

}  // namespace vitlr
