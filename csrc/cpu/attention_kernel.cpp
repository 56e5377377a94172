// Attention of one head, compiled once for each instruction set (VITLR_ISA, see setup.py).
//
// Keys and values are packed once a head, like weights. A tile of queries is multiplied with all keys; its scores, in fp32,
// become their exponentials, which are multiplied with all values; rows are divided by their sums at the end.
#include "cpu/attention.h"

#include "cpu/activations.h"
#include "cpu/tile.h"

namespace vitlr {
namespace {

template <class T>
inline int64_t words_of(int64_t n) {
  return (n + T::elements - 1) / T::elements;
}

template <class T>
inline int64_t block_words(int64_t n) {  // of one row of a block
  return (words_of<T>(n) + kChunk - 1) / kChunk * kChunk;
}

// Where the parts of a head's memory begin, in words of 32 bits.
template <class T>
struct Room {
  Room(int64_t key_count, int64_t width)
      : values(keys + stored_columns(key_count) * words_of<T>(width)),
        queries(values + stored_columns(width) * words_of<T>(key_count)),
        shares(queries + kRows * block_words<T>(width)),
        scores(shares + kRows * block_words<T>(key_count)),
        end(scores + kRows * kColumns * panels_of(key_count)) {}
  const int64_t keys = 0, values;  // packed: [panel][words of the width][keys], [panel][words of the keys][columns]
  const int64_t queries, shares;   // blocks of kRows rows
  const int64_t scores, end;       // fp32: [panel of keys][kRows][kColumns]
};

template <class T>
int64_t room(int64_t keys, int64_t width) {
  return Room<T>(keys, width).end * 4;
}

template <class T>
void pack_keys(const void* k, int64_t stride, int64_t keys, int64_t width, Word* out) {
  const int64_t depth = words_of<T>(width), whole = T::bytes * T::elements == 4 ? width / T::elements : 0;
  for (int64_t p = 0; p < panels_of(keys); ++p) {
    const int64_t columns = width_of(keys, p);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t n = p * kColumns + c;
      const char* row = static_cast<const char*>(k) + n * stride * T::bytes;
      int64_t w = 0;
      for (; n < keys && w < whole; ++w) __builtin_memcpy(out + w * columns + c, row + w * 4, 4);
      for (; w < depth; ++w) {
        Word word = 0;
        if (n < keys && T::pairs) {
          __builtin_memcpy(&word, row + w * 4, 2);  // the last element of an odd width
        } else if (n < keys) {
          const float value = element<T>(row, w);
          __builtin_memcpy(&word, &value, 4);
        }
        out[w * columns + c] = word;
      }
    }
    out += depth * columns;
  }
}

// Columns n.. of a row; 0 beyond `width`.
template <class T>
inline Vector columns_of(const void* v, int64_t row, int64_t n, int64_t width) {
  if (n + kLanes <= width) return elements<T>(v, row + n);
  float values[kLanes] = {};
  for (int64_t l = 0; n + l < width; ++l) values[l] = element<T>(v, row + n + l);
  return load(values);
}

template <class T>
void pack_values(const void* v, int64_t stride, int64_t keys, int64_t width, Word* out) {
  for (int64_t p = 0; p < panels_of(width); ++p)
    for (int64_t k = 0; k < keys; k += T::elements)
      for (int64_t c = 0; c < width_of(width, p); c += kLanes, out += kLanes) {
        const int64_t n = p * kColumns + c;
        const Vector even = columns_of<T>(v, k * stride, n, width);
        if (T::pairs)
          store(out, paired(even, k + 1 < keys ? columns_of<T>(v, (k + 1) * stride, n, width) : Vector{}));
        else
          store(out, even);
      }
}

// block row m = exp(scale (scores - the largest of them)); returns their sum. A row with a NaN becomes NaN altogether.
template <class T>
float exponentials(const float* scores, int64_t keys, float scale, int64_t rows, int64_t m, Word* block) {
  const int64_t stored = stored_columns(keys);
  const auto at = [&](int64_t n) { return scores + (n / kColumns * kRows + m) * kColumns + n % kColumns; };
  Vector top = load(at(0));
  for (int64_t n = kLanes; n < stored; n += kLanes) {
    const Vector s = load(at(n));
    top = s > top ? s : top;
  }
  float largest = top[0];
  for (int l = 1; l < kLanes; ++l) largest = top[l] > largest ? top[l] : largest;
  Vector sum = {};
  for (int64_t n = 0; n < stored; n += kLanes) {
    const Vector e = exponential((load(at(n)) - largest) * scale);
    sum += e;
    put_words<T>(block_row<T>(block, rows, m, n), e);
  }
  float total = 0.0f;
  for (int l = 0; l < kLanes; ++l) total += sum[l];
  return total;
}

template <class T>
inline void put_columns(void* y, int64_t row, int64_t n, int64_t width, Vector v) {
  if (n + kLanes <= width) return put<T>(y, row + n, v);
  for (int64_t l = 0; n + l < width; ++l) put<T>(y, row + n + l, static_cast<float>(v[l]));
}

template <class T>
inline Tile product_of(int64_t rows, int64_t columns) {
  return columns == kColumns ? tile_of<T, 2>(rows) : tile_of<T, 1>(rows);
}

template <class T>
void head(const Head& call) {
  const int64_t depth = words_of<T>(call.width), key_words = words_of<T>(call.keys);
  const Room<T> room(call.keys, call.width);
  Word* const memory = static_cast<Word*>(call.memory);
  Word *const keys = memory + room.keys, *const values = memory + room.values;
  Word *const queries = memory + room.queries, *const shares = memory + room.shares;
  float* const all_scores = reinterpret_cast<float*>(memory + room.scores);
  pack_keys<T>(call.k, call.k_stride, call.keys, call.width, keys);
  pack_values<T>(call.v, call.v_stride, call.keys, call.width, values);
  const int64_t tiles = (call.queries + kRows - 1) / kRows;
  alignas(64) float sums[kRows * kColumns], totals[kRows];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.queries * t / tiles, rows = call.queries * (t + 1) / tiles - first;
    fill<T>(static_cast<const char*>(call.q) + first * call.q_stride * T::bytes, call.q_stride, 1, rows, call.width,
            queries);
    for (int64_t p = 0; p < panels_of(call.keys); ++p) {
      const int64_t columns = width_of(call.keys, p);
      float* scores = all_scores + p * kRows * kColumns;
      product_of<T>(rows, columns)(queries, rows * kChunk, depth, keys + p * kColumns * depth, scores, false);
      for (int64_t m = 0; m < rows; ++m)  // keys that do not exist get no share
        for (int64_t c = call.keys - p * kColumns; c < columns; ++c) scores[m * kColumns + c] = -__builtin_inff();
    }
    for (int64_t m = 0; m < rows; ++m)
      totals[m] = exponentials<T>(all_scores, call.keys, call.scale, rows, m, shares);
    for (int64_t p = 0; p < panels_of(call.width); ++p) {
      const int64_t columns = width_of(call.width, p);
      product_of<T>(rows, columns)(shares, rows * kChunk, key_words, values + p * kColumns * key_words, sums,
                                   false);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += kLanes)
          put_columns<T>(call.y, (first + m) * call.y_stride, p * kColumns + c, call.width,
                         load(sums + m * kColumns + c) * (1.0f / totals[m]));
    }
  }
}

#define VITLR_JOIN3(a, b, c) a##b##c
#define VITLR_NAME(dtype, isa) VITLR_JOIN3(attention_, dtype, isa)

template <class T>
constexpr AttentionKernel kernel() {
  return {kRows, T::bytes, room<T>, head<T>};
}

}  // namespace

const AttentionKernel& VITLR_NAME(fp32_, VITLR_ISA)() {
  static constexpr AttentionKernel table = kernel<Fp32>();
  return table;
}

const AttentionKernel& VITLR_NAME(bf16_, VITLR_ISA)() {
  static constexpr AttentionKernel table = kernel<Bf16>();
  return table;
}

}  // namespace vitlr
