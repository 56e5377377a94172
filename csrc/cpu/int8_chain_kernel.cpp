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

// Int32 sums of some columns of a row to floats, activation.
template <class T, int ACT>
inline Vector value_of(const Word* sums, Vector scale, Vector bias) {
  const Vector sum = __builtin_convertvector((Integers)load(sums), Vector);
  return activate<ACT, T::bf16>(sum * scale + bias);
}

// Columns n.. of rows first.. of the output or of the block of the next layer.
// What is copied into locals is known not to lie where the results go, and stays in registers.
template <class T, int ACT>
void finish(const Panel& call, int64_t first, int64_t rows, const Word* sums, const Columns& columns, int64_t n,
            int64_t width) {
  const Panel panel = call;
  for (int64_t c = 0; c < width; c += kLanes, sums += kLanes) {
    const Vector scale = load(columns.scale + c), bias = load(columns.bias + c);
    const Vector multiplier = load(columns.multiplier + c), shift = load(columns.shift + c);
    const auto value = [&](int64_t i) { return value_of<T, ACT>(sums + i * kColumns, scale, bias); };
    const int64_t count = smaller(kLanes, width - c);
    if (!panel.next) {
      for (int64_t i = 0; i < rows; ++i) put_output<T>(panel, first + i, n + c, count, value(i));
      continue;
    }
    Word* const to = block_row<Int8>(panel.next, panel.rows, first, n + c);
    if (count == kLanes)
      for (int64_t i = 0; i < rows; ++i) put_bytes(to + i * kChunk, nearest_bytes(value(i) * multiplier + shift));
    else
      for (int64_t i = 0; i < rows; ++i) put_some_bytes(to + i * kChunk, nearest_bytes(value(i) * multiplier + shift), count);
  }
}

// The further columns of the next layer that read these channels again.
template <class T, int ACT>
void finish_wide(const Panel& panel, int64_t first, int64_t rows, const Word* sums, const Columns& columns, int64_t n,
                 int64_t width) {
  int64_t wide = columns.wide;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t from = wide;
    while (wide < columns.end && panel.next_input.wide[wide] < n + c + kLanes) ++wide;
    for (int64_t e = from; e < wide; e += kLanes)
      for (int64_t i = 0; i < rows; ++i)
        put_wide_of(panel, first + i, n + c, e, smaller(kLanes, wide - e),
                    value_of<T, ACT>(sums + i * kColumns + c, load(columns.scale + c), load(columns.bias + c)));
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

// Sums of a group of rows in one panel, of which some rows at a time are finished, while the tiles multiply for the next.
template <class T, int ACT, bool LAST>
struct Unfinished {
  const Columns* columns;
  const Word* sums;
  int64_t first, rows, n, width, done;
  char* to;              // of the first row: of y or of the block of the next layer
  const char* residual;  // of the first row, or null

  // A part of the loop of products: a call would cost as much as three rows.
  __attribute__((always_inline)) inline void some(const Panel& panel, int64_t most) {
    if (done == rows) return;
    if (width < kColumns) return whole(panel);
    const int64_t end = smaller(done + most, rows), beside = panel.residual_stride * T::bytes;
    const int64_t stride = LAST ? panel.y_stride * T::bytes : kChunk * 4;
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const Vector scale = load(columns->scale + c), bias = load(columns->bias + c);
      const Vector multiplier = load(columns->multiplier + c), shift = load(columns->shift + c);
      for (int64_t i = done; i < end; ++i) {
        Vector v = value_of<T, ACT>(sums + i * kColumns + c, scale, bias);
        if (LAST && residual) v += elements<T>(residual + i * beside, c);
        if (LAST)
          put<T>(to + i * stride, c, v);
        else
          put_bytes(reinterpret_cast<Word*>(to + i * stride) + c / Int8::elements, nearest_bytes(v * multiplier + shift));
      }
    }
    done = end;
    if (!LAST && done == rows && columns->wide < columns->end)
      finish_wide<T, ACT>(panel, first, rows, sums, *columns, n, width);
  }

  void whole(const Panel& panel) {
    finish<T, ACT>(panel, first, rows, sums, *columns, n, width);
    if (!LAST) finish_wide<T, ACT>(panel, first, rows, sums, *columns, n, width);
    done = rows;
  }
};

// Into L2, some of what lies from `next` to `end` at a time: weights come from L3 or memory, and are needed a panel later.
struct Ahead {
  const char *next, *end;

  void some(int64_t lines) {
    for (; lines > 0 && next < end; --lines, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// Bytes of weights that stay in L2 from one block of rows to the next.
constexpr int64_t kMuch = int64_t{1} << 20;

// Sixteens of words that are multiplied for all groups of rows before the next: the panel of 2 KiB each stays in L1.
constexpr int64_t kMostSteps = 20;

// Groups of rows, all of one shape, so that tiles are shaped once: the last one may have rows of the one before it.
template <class T, int ACT, bool LAST>
void panels(const Panel& given, int64_t end) {
  const Panel call = given;  // known not to lie where the results go
  const Weight& weight = *call.weights[0];
  const int64_t words = stored_words(weight.K), steps = words / kTile;
  const int64_t parts = (steps + kMostSteps - 1) / kMostSteps, part = (steps + parts - 1) / parts * kTile;
  const int64_t groups = (call.rows + kTileRows - 1) / kTileRows, each = (call.rows + groups - 1) / groups;
  const int64_t times = part / kTile - 1;  // that there is something between
  const int64_t share = times ? (each + times - 1) / times : each, lines = times ? 2 * part / (groups * times) + 1 : 0;
  const int64_t places = parts == 1 ? 2 : groups + 1;  // of sums that are made, and of those that are finished
  alignas(64) Word sums[kMostRows / kTileRows + 1][kTileRows * kColumns];  // of int32
  Columns columns[2];
  Unfinished<T, ACT, LAST> before{};
  int64_t place = 0;
  shape_tiles(each);
  for (int64_t index = call.index; index < end; ++index) {
    const int64_t n = index * kColumns, width = smaller(kColumns, weight.N - n);
    const Word* panel = static_cast<const Word*>(weight.panels) + n * words;  // every panel before is of full width
    const int64_t stored = width_of(weight.N, index);
    Ahead ahead{reinterpret_cast<const char*>(panel + stored * words), nullptr};
    if (index + 1 < end && weight.N * words * 4 > kMuch) ahead.end = ahead.next + width_of(weight.N, index + 1) * words * 4;
    Columns& own = columns[index & 1];
    own = columns_of(call, n, width);
    for (int64_t k = 0; k < words; k += part)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = smaller(g * each, call.rows - each);
        Word* const into = sums[(place + g) % places];
        const auto between = [&] {
          before.some(call, share);
          ahead.some(lines);
        };
        multiply_tiles<Int8>(static_cast<const Word*>(call.blocks[0]) + first * kChunk + k * call.rows, call.rows,
                             smaller(part, words - k), panel + k * stored, into, k > 0, each, width, between);
        if (k + part < words) continue;
        before.some(call, each);
        before = {&own, into, first, each, n, width, 0, nullptr, nullptr};
        before.to = LAST ? static_cast<char*>(call.y) + (first * call.y_stride + n) * T::bytes
                         : reinterpret_cast<char*>(block_row<Int8>(call.next, call.rows, first, n));
        if (call.residual)
          before.residual = static_cast<const char*>(call.residual) + (first * call.residual_stride + n) * T::bytes;
      }
    place = (place + groups) % places;
  }
  _tile_release();  // or every switch of threads would save them
  before.some(call, each);
}

template <class T, int ACT>
void panels(const Panel& first, int64_t end) {
  first.next ? panels<T, ACT, false>(first, end) : panels<T, ACT, true>(first, end);
}

#else

// Columns n.. of these rows of y and of the residual, into L1: rows are far apart, and no prefetcher of the CPU sees that.
template <class T>
void prefetch_output(const Panel& call, int64_t first, int64_t rows, int64_t n) {
  if (call.next) return;
  for (int64_t m = first; m < first + rows; ++m)
    for (int64_t c = n * T::bytes; c < (n + kColumns) * T::bytes; c += 64) {
      __builtin_prefetch(static_cast<const char*>(call.y) + m * call.y_stride * T::bytes + c, 1);
      if (call.residual) __builtin_prefetch(static_cast<const char*>(call.residual) + m * call.residual_stride * T::bytes + c);
    }
}

template <class T, int ACT>
void panel(const Panel& call) {
  const Weight& weight = *call.weights[0];
  const int64_t n = call.index * kColumns, width = smaller(kColumns, weight.N - n);
  const int64_t words = stored_words(weight.K);
  const Word* panel = static_cast<const Word*>(weight.panels) + n * words;  // every panel before is of full width
  const Word* block = static_cast<const Word*>(call.blocks[0]);
  const Columns columns = columns_of(call, n, width);
  alignas(64) Word sums[kTileRows * kColumns];  // of int32
  const int64_t tiles = (call.rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - first;
    const Tile product = width > kLanes ? tile_of<Int8, 2>(rows) : tile_of<Int8, 1>(rows);
    prefetch_output<T>(call, first, rows, n);
    product(block + first * kChunk, call.rows * kChunk, words, panel, reinterpret_cast<float*>(sums), false);
    finish<T, ACT>(call, first, rows, sums, columns, n, width);
    if (call.next) finish_wide<T, ACT>(call, first, rows, sums, columns, n, width);
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
