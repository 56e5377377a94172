// The micro-kernels of chains, compiled once for each instruction set (VITLR_ISA, see setup.py).
#include "cpu/activations.h"
#include "cpu/chain.h"
#include "cpu/packing.h"
#include "cpu/tile.h"

namespace vitlr {
namespace {

// ---- what follows the product

// Columns n.. of `rows` rows: bias, activation, residual, store. `width`: how many of the panel's columns exist.
template <class T, int ACT>
void finish(const Panel& panel, int64_t first, int64_t rows, const float* sums, const float* bias, int64_t n,
            int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t m = first + i;
    for (int64_t c = 0; c < width; c += kLanes) {
      Vector v = activate<ACT, T::bf16>(load(sums + i * kColumns + c) + load(bias + c));
      if (panel.next) {
        if (c + kLanes > width) {  // what does not exist must be 0 there: Inf * 0 would be NaN
          float values[kLanes];
          store(values, v);
          for (int64_t l = width - c; l < kLanes; ++l) values[l] = 0.0f;
          v = load(values);
        }
        put_words<T>(block_row<T>(panel.next, panel.rows, m, n + c), v);
      } else {
        put_output<T>(panel, m, n + c, width - c, v);
      }
    }
  }
}

template <class T>
void finish(const Panel& panel, int64_t first, int64_t rows, const float* sums, const float* bias, int64_t n,
            int64_t width) {
  switch (panel.act) {
    case kNone: return finish<T, kNone>(panel, first, rows, sums, bias, n, width);
    case kGelu: return finish<T, kGelu>(panel, first, rows, sums, bias, n, width);
    case kGeluTanh: return finish<T, kGeluTanh>(panel, first, rows, sums, bias, n, width);
    case kSilu: return finish<T, kSilu>(panel, first, rows, sums, bias, n, width);
    case kRelu: return finish<T, kRelu>(panel, first, rows, sums, bias, n, width);
    case kSigmoid: return finish<T, kSigmoid>(panel, first, rows, sums, bias, n, width);
  }
}

// ---- one panel of one layer on one block

template <class T>
void panel(const Panel& call) {
  const int64_t N = call.weights[0]->N, n = call.index * kColumns;
  const int64_t width = smaller(kColumns, N - n), stored = width_of(N, call.index);
  const Word* panels[2] = {};
  int64_t words[2] = {};
  Word* room = static_cast<Word*>(call.expanded);
  for (int i = 0; i < 2 && call.weights[i]; ++i) {
    const Weight& weight = *call.weights[i];
    words[i] = (weight.K + T::elements - 1) / T::elements;
    // Every panel before this one is of full width.
    const char* at = static_cast<const char*>(weight.panels) + call.index * panel_bytes<T>(weight.K, kColumns, weight.form);
    if (weight.form == kPlain && T::elements * T::bytes == 4) {
      panels[i] = reinterpret_cast<const Word*>(at);
      continue;
    }
    const int64_t groups = weight.form == kPlain ? 0 : (weight.K + weight.group - 1) / weight.group;
    expand<T>(at, weight.scales + call.index * groups * kColumns, weight.K, weight.group, stored, weight.form, room);
    panels[i] = room;
    room += words[i] * stored;
  }
  float bias[kColumns] = {};
  for (int64_t c = 0; call.bias && c < width; ++c) bias[c] = element<T>(call.bias, n + c);

  const int64_t tiles = (call.rows + kRows - 1) / kRows;
  alignas(64) float sums[kRows * kColumns];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - first;
    const Tile product = stored == kColumns ? tile_of<T, 2>(rows) : tile_of<T, 1>(rows);
    // Rows of y lie far apart, where no hardware prefetcher sees them coming; the product hides the wait.
    for (int64_t m = first; call.y && m < first + rows; ++m)
      for (int64_t byte = 0; byte < width * T::bytes; byte += 64)
        __builtin_prefetch(static_cast<char*>(call.y) + (m * call.y_stride + n) * T::bytes + byte, 1);
    for (int i = 0; i < 2 && call.weights[i]; ++i)
      product(static_cast<const Word*>(call.blocks[i]) + first * kChunk, call.rows * kChunk, words[i], panels[i], sums,
              i > 0);
    finish<T>(call, first, rows, sums, bias, n, width);
  }
}

template <class T>
void fill_block(const void* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t K, Bytes, void* block) {
  fill<T>(x, row_stride, column_stride, rows, K, block);
}

template <class T>
void panels(const Panel& first, int64_t end) {
  for (Panel call = first; call.index < end; ++call.index) panel<T>(call);
}

#define VITLR_JOIN3(a, b, c) a##b##c
#define VITLR_NAME(dtype, isa) VITLR_JOIN3(chain_, dtype, isa)
#define VITLR_STRING(isa) #isa
#define VITLR_TEXT(isa) VITLR_STRING(isa)

template <class T>
constexpr ChainKernel kernel() {
  return {VITLR_TEXT(VITLR_ISA), kColumns,      kRows,         T::elements, T::bytes, packed_bytes<T>,
          pack<T>,               pack_codes<T>, fill_block<T>, panels<T>,   peak_of<T>};
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
