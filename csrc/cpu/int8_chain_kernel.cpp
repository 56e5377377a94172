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
// What is copied into locals is known not to lie where the results go, and stays in registers.
template <class T, int ACT>
void finish(const Panel& call, int64_t first, int64_t rows, const void* int32_sums, const Columns& columns, int64_t n,
            int64_t width) {
  const Panel panel = call;
  const Word* sums = static_cast<const Word*>(int32_sums);
  int64_t wide = columns.wide;
  for (int64_t c = 0; c < width; c += kLanes, sums += kLanes) {
    const Vector scale = load(columns.scale + c), bias = load(columns.bias + c);
    const Vector multiplier = load(columns.multiplier + c), shift = load(columns.shift + c);
    const auto value = [&](int64_t i) {
      const Vector sum = __builtin_convertvector((Integers)load(sums + i * kColumns), Vector);
      return activate<ACT, T::bf16>(sum * scale + bias);
    };
    const bool whole = c + kLanes <= width;
    if (!panel.next) {
      for (int64_t i = 0; i < rows; ++i) put_output<T>(panel, first + i, n + c, whole ? kLanes : width - c, value(i));
      continue;
    }
    Word* const to = block_row<Int8>(panel.next, panel.rows, first, n + c);
    if (whole)
      for (int64_t i = 0; i < rows; ++i) put_bytes(to + i * kChunk, nearest_bytes(value(i) * multiplier + shift));
    else
      for (int64_t i = 0; i < rows; ++i)
        put_some_bytes(to + i * kChunk, nearest_bytes(value(i) * multiplier + shift), width - c);
    const int64_t from = wide;
    while (wide < columns.end && panel.next_input.wide[wide] < n + c + kLanes) ++wide;
    for (int64_t e = from; e < wide; e += kLanes)
      for (int64_t i = 0; i < rows; ++i)
        put_wide_of(panel, first + i, n + c, e, smaller(kLanes, wide - e), value(i));
  }
}

// What is known of the columns of a panel.
inline Columns columns_of(const Panel& call, int64_t n, int64_t width) {
  Columns columns;
  for (int64_t c = 0; c < width; ++c) {
    columns.scale[c] = call.weights[0]->scales[n + c], columns.bias[c] = static_cast<const float*>(call.bias)[n + c];
    if (call.next)
      columns.multiplier[c] = call.next_input.multiplier[n + c], columns.shift[c] = call.next_input.shift[n + c];
  }
  if (call.next) {
    const Bytes& next = call.next_input;
    while (columns.wide < next.more && next.wide[columns.wide] < n) ++columns.wide;
    for (columns.end = columns.wide; columns.end < next.more && next.wide[columns.end] < n + width;) ++columns.end;
  }
  return columns;
}

#if defined(__AMX_INT8__)

// Sums of some rows in one panel that are finished bit by bit, while the tiles multiply for the next.
template <class T, int ACT>
struct Unfinished {
  const Columns* columns;
  const Word* sums;
  int64_t first, rows, n, width;

  void some(const Panel& call, int64_t most) {
    const int64_t count = smaller(most, rows);
    if (count == 0) return;
    finish<T, ACT>(call, first, count, sums, *columns, n, width);
    sums += count * kColumns, first += count, rows -= count;
  }
};

// Groups of rows, all of one shape, so that tiles are shaped once: the last one may have rows of the one before it.
template <class T, int ACT>
void panels(const Panel& call, int64_t end) {
  const Weight& weight = *call.weights[0];
  const int64_t words = stored_words(weight.K), steps = words / kTile;
  const int64_t groups = (call.rows + kTileRows - 1) / kTileRows, each = (call.rows + groups - 1) / groups;
  const int64_t share = (each + steps - 1) / steps;
  alignas(64) Word sums[2][kTileRows * kColumns];  // of int32: those that are made, and those that are finished
  Columns columns[2];
  Unfinished<T, ACT> before{};
  bool turn = false;
  shape_tiles(each);
  for (int64_t index = call.index; index < end; ++index) {
    const int64_t n = index * kColumns, width = smaller(kColumns, weight.N - n);
    const Word* panel = static_cast<const Word*>(weight.panels) + n * words;  // every panel before is of full width
    Columns& own = columns[index & 1];
    own = columns_of(call, n, width);
    for (int64_t g = 0; g < groups; ++g, turn = !turn) {
      const int64_t first = smaller(g * each, call.rows - each);
      multiply_tiles<Int8>(static_cast<const Word*>(call.blocks[0]) + first * kChunk, call.rows, words, panel, sums[turn],
                           each, width, [&] { before.some(call, share); });
      before = {&own, sums[turn], first, each, n, width};
    }
  }
  _tile_release();  // or every switch of threads would save them
  before.some(call, each);
}

#else

template <class T, int ACT>
void panel(const Panel& call) {
  const Weight& weight = *call.weights[0];
  const int64_t n = call.index * kColumns, width = smaller(kColumns, weight.N - n);
  const int64_t words = stored_words(weight.K);
  const Word* panel = static_cast<const Word*>(weight.panels) + n * words;  // every panel before is of full width
  const Word* block = static_cast<const Word*>(call.blocks[0]);
  const Columns columns = columns_of(call, n, width);
  alignas(64) float sums[kTileRows * kColumns];  // of int32
  const int64_t tiles = (call.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - first;
    const Tile product = width > kLanes ? tile_of<Int8, 2>(rows) : tile_of<Int8, 1>(rows);
    product(block + first * kChunk, call.rows * kChunk, words, panel, sums, false);
    finish<T, ACT>(call, first, rows, sums, columns, n, width);
  }
}

template <class T, int ACT>
void panels(const Panel& first, int64_t end) {
  for (Panel call = first; call.index < end; ++call.index) panel<T, ACT>(call);
}

#endif

template <class T>
void panels(const Panel& first, int64_t end) {
  switch (first.act) {
    case kNone: return panels<T, kNone>(first, end);
    case kGelu: return panels<T, kGelu>(first, end);
    case kGeluTanh: return panels<T, kGeluTanh>(first, end);
    case kSilu: return panels<T, kSilu>(first, end);
    case kRelu: return panels<T, kRelu>(first, end);
    case kSigmoid: return panels<T, kSigmoid>(first, end);
  }
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
          fill_bytes<T>,         panels<T>, peak};
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
