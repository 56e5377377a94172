// Attention of one head, compiled once for each instruction set (VITLR_ISA, see setup.py).
//
// Keys and values are packed once a head, like weights. A tile of queries is multiplied with all keys; its scores, in fp32,
// become their exponentials, which are multiplied with all values; rows are divided by their sums at the end.
#include "cpu/attention.h"

#include "cpu/activations.h"
#include "cpu/tile.h"

#if defined(__AMX_BF16__)
#include "cpu/amx.h"
#endif

namespace vitlr {
namespace {

#if defined(__AMX_BF16__)
constexpr int64_t kQueries = 2 * kTile;  // of a tile
constexpr int64_t kDepth = kTile;        // words that are multiplied at once
#else
constexpr int64_t kQueries = kRows;
constexpr int64_t kDepth = 1;
#endif

template <class T>
inline int64_t words_of(int64_t n) {
  return (n + T::elements * kDepth - 1) / (T::elements * kDepth) * kDepth;
}

template <class T>
inline int64_t block_words(int64_t n) {  // of one row of a block
  return (words_of<T>(n) + kChunk - 1) / kChunk * kChunk;
}

// Where the parts of a head's memory begin, in words of 32 bits.
template <class T>
struct Room {
  Room(int64_t key_count, int64_t width, int64_t value_width)
      : values(keys + stored_columns(key_count) * words_of<T>(width)),
        queries(values + stored_columns(value_width) * words_of<T>(key_count)),
        shares(queries + kQueries * block_words<T>(width)),
        scores(shares + kQueries * block_words<T>(key_count)),
        end(scores + kQueries * kColumns * panels_of(key_count)) {}
  const int64_t keys = 0, values;  // packed: [panel][words of the width][keys], [panel][words of the keys][columns]
  const int64_t queries, shares;   // blocks of kQueries rows
  const int64_t scores, end;       // fp32: [panel of keys][kQueries][kColumns]
};

template <class T>
int64_t room(int64_t keys, int64_t width, int64_t value_width) {
  return Room<T>(keys, width, value_width).end * 4;
}

// Sixteen words of each of sixteen rows, `stride` bytes apart, as columns of sixteen rows of `columns` words.
inline void transpose(const char* rows, int64_t stride, Word* out, int64_t columns) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // within 128 bits: words of two rows, then of four
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {  // then of all: 128 bits of each of four
    b[w] = _mm512_shuffle_i32x4(a[w], a[w + 4], 0x88), b[w + 4] = _mm512_shuffle_i32x4(a[w + 8], a[w + 12], 0x88);
    b[w + 8] = _mm512_shuffle_i32x4(a[w], a[w + 4], 0xdd), b[w + 12] = _mm512_shuffle_i32x4(a[w + 8], a[w + 12], 0xdd);
    _mm512_storeu_si512(out + w * columns, _mm512_shuffle_i32x4(b[w], b[w + 4], 0x88));
    _mm512_storeu_si512(out + (w + 8) * columns, _mm512_shuffle_i32x4(b[w], b[w + 4], 0xdd));
    _mm512_storeu_si512(out + (w + 4) * columns, _mm512_shuffle_i32x4(b[w + 8], b[w + 12], 0x88));
    _mm512_storeu_si512(out + (w + 12) * columns, _mm512_shuffle_i32x4(b[w + 8], b[w + 12], 0xdd));
  }
#else
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t w = 0; w < 16; ++w) __builtin_memcpy(out + w * columns + i, rows + i * stride + w * 4, 4);
#endif
}

// Word w of a key, 0 where it has none.
template <class T>
inline Word word_of(const char* row, int64_t w, int64_t width) {
  Word word = 0;
  if ((w + 1) * T::elements <= width && T::bytes * T::elements == 4) {
    __builtin_memcpy(&word, row + w * 4, 4);
  } else if (T::pairs && w * 2 < width) {
    __builtin_memcpy(&word, row + w * 4, 2);  // the last element of an odd width
  } else if (!T::pairs && w < width) {
    const float value = element<T>(row, w);
    __builtin_memcpy(&word, &value, 4);
  }
  return word;
}

template <class T>
void pack_keys(const void* k, int64_t stride, int64_t keys, int64_t width, Word* out) {
  const int64_t depth = words_of<T>(width), whole = T::bytes * T::elements == 4 ? width / T::elements : 0;
  for (int64_t n = 0; n < stored_columns(keys);) {
    const int64_t columns = width_of(keys, n / kColumns), end = n + columns;
    for (int64_t step; n < end; n += step) {
      Word* const column = out + n % kColumns;
      const char* row = static_cast<const char*>(k) + n * stride * T::bytes;
      int64_t w = 0;
      step = n % 16 == 0 && n + 16 <= keys && n + 16 <= end ? 16 : 1;
      for (; step == 16 && w + 16 <= whole; w += 16) transpose(row + w * 4, stride * T::bytes, column + w * columns, columns);
      for (; w < depth; ++w)
        for (int64_t i = 0; i < step; ++i)
          column[w * columns + i] = n + i < keys ? word_of<T>(row + i * stride * T::bytes, w, width) : 0;
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
    for (int64_t k = 0; k < words_of<T>(keys) * T::elements; k += T::elements)
      for (int64_t c = 0; c < width_of(width, p); c += kLanes, out += kLanes) {
        const int64_t n = p * kColumns + c;
        const Vector even = k < keys ? columns_of<T>(v, k * stride, n, width) : Vector{};
        if (T::pairs)
          store(out, paired(even, k + 1 < keys ? columns_of<T>(v, (k + 1) * stride, n, width) : Vector{}));
        else
          store(out, even);
      }
}

// exp(scale (score - the largest)) of a vector of scores.
template <class T>
struct Shares {
  Shares(float largest_score, float factor) : largest(largest_score), scale(factor), offset(-largest_score * factor * kLog2) {}
  Vector operator()(Vector scores) const {
    if (T::bf16) return power_bf16(scores * (scale * kLog2) + offset);  // what rounds the offset is the same in all shares
    return exponential((scores - largest) * scale);
  }
  static constexpr float kLog2 = 1.44269504f;  // of e
  const float largest, scale, offset;
};

// block row m = the shares, up to a factor; returns their sum. A row with a NaN becomes NaN altogether.
template <class T>
float exponentials(const float* scores, int64_t keys, float scale, int64_t rows, int64_t m, Word* block) {
  const int64_t panels = panels_of(keys), last = width_of(keys, panels - 1);
  const float* const row = scores + m * kColumns;
  Vector top = load(row), other = top;  // of the left and the right half of panels
  for (int64_t p = 0; p < panels; ++p) {
    const float* at = row + p * kQueries * kColumns;
    const Vector left = load(at), right = load(p + 1 < panels || last > kLanes ? at + kLanes : at);
    top = left > top ? left : top;
    other = right > other ? right : other;
  }
  const float largest = largest_of(top > other ? top : other);
  const bool blind = largest == -__builtin_inff();  // who sees no key shares nothing
  const Shares<T> shares(blind ? 0 : largest, scale);
  Vector sum = {};
  for (int64_t p = 0; p < panels; ++p) {
    const float* at = row + p * kQueries * kColumns;
    Word* const to = block_row<T>(block, rows, m, p * kColumns);
    const Vector left = shares(load(at));
    sum += left;
    put_words<T>(to, left);
    if (p + 1 == panels && last <= kLanes) break;
    const Vector right = shares(load(at + kLanes));
    sum += right;
    put_words<T>(to + kLanes / T::elements, right);
  }
  return blind ? 0 : sum_of(sum);
}

// Rows of a panel of scores become scale score + bias, in columns from n on.
template <class T>
void add_bias(const Head& call, int64_t first, int64_t rows, int64_t n, int64_t columns, float* scores) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < columns; c += kLanes) {
      float* const at = scores + m * kColumns + c;
      store(at, load(at) * call.scale + columns_of<T>(call.bias, (first + m) * call.bias_stride, n + c, call.keys));
    }
}

template <class T>
inline void put_columns(void* y, int64_t row, int64_t n, int64_t width, Vector v) {
  if (n + kLanes <= width) return put<T>(y, row + n, v);
  for (int64_t l = 0; n + l < width; ++l) put<T>(y, row + n + l, static_cast<float>(v[l]));
}

// sums [rows][kColumns] = block x panel of so many columns.
template <class T>
inline void multiply(const Word* block, int64_t rows, int64_t words, const Word* panel, float* sums, int64_t columns) {
#if defined(__AMX_BF16__)
  // Rows that do not exist are multiplied as well, whatever lies there: nobody reads them.
  multiply_tiles<T>(block, rows, words, panel, reinterpret_cast<Word*>(sums), false, rows, columns, Nothing());
#else
  const Tile product = columns == kColumns ? tile_of<T, 2>(rows) : tile_of<T, 1>(rows);
  product(block, rows * kChunk, words, panel, sums, false);
#endif
}

// Words from.. of all rows of a block become 0, where tiles would multiply whatever lies there, a NaN even with 0.
template <class T>
void clear_rest(Word* block, int64_t rows, int64_t from, int64_t words) {
  for (int64_t w = from; w < words; ++w)
    for (int64_t m = 0; m < rows; ++m) *block_row<T>(block, rows, m, w * T::elements) = 0;
}

template <class T>
void head(const Head& call) {
  const int64_t depth = words_of<T>(call.width), key_words = words_of<T>(call.keys);
  const Room<T> room(call.keys, call.width, call.value_width);
  Word* const memory = static_cast<Word*>(call.memory);
  Word *const keys = memory + room.keys, *const values = memory + room.values;
  Word *const queries = memory + room.queries, *const shares = memory + room.shares;
  float* const all_scores = reinterpret_cast<float*>(memory + room.scores);
  pack_keys<T>(call.k, call.k_stride, call.keys, call.width, keys);
  pack_values<T>(call.v, call.v_stride, call.keys, call.value_width, values);
  const int64_t tiles = (call.queries + kQueries - 1) / kQueries;
  const float scale = call.bias ? 1 : call.scale;  // of what shares are made of
  alignas(64) float sums[kQueries * kColumns], totals[kQueries];
#if defined(__AMX_BF16__)
  shape_tiles(kQueries);
#endif
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = call.queries * t / tiles, rows = call.queries * (t + 1) / tiles - first;
    fill<T>(static_cast<const char*>(call.q) + first * call.q_stride * T::bytes, call.q_stride, 1, rows, call.width,
            queries);
    clear_rest<T>(queries, rows, (call.width + T::elements - 1) / T::elements, depth);
    for (int64_t p = 0; p < panels_of(call.keys); ++p) {
      const int64_t columns = width_of(call.keys, p);
      float* scores = all_scores + p * kQueries * kColumns;
      multiply<T>(queries, rows, depth, keys + p * kColumns * depth, scores, columns);
      if (call.bias) add_bias<T>(call, first, rows, p * kColumns, columns, scores);
      for (int64_t m = 0; m < rows && (p + 1) * kColumns > call.keys; ++m)  // keys that do not exist get no share
        for (int64_t c = call.keys - p * kColumns; c < columns; ++c) scores[m * kColumns + c] = -__builtin_inff();
    }
    for (int64_t m = 0; m < rows; ++m)
      totals[m] = exponentials<T>(all_scores, call.keys, scale, rows, m, shares);
    clear_rest<T>(shares, rows, stored_columns(call.keys) / T::elements, key_words);
    for (int64_t p = 0; p < panels_of(call.value_width); ++p) {
      const int64_t columns = width_of(call.value_width, p);
      multiply<T>(shares, rows, key_words, values + p * kColumns * key_words, sums, columns);
      for (int64_t m = 0; m < rows; ++m) {
        const float share = totals[m] == 0 ? 0 : 1 / totals[m];
        for (int64_t c = 0; c < columns; c += kLanes)
          put_columns<T>(call.y, (first + m) * call.y_stride, p * kColumns + c, call.value_width,
                         load(sums + m * kColumns + c) * share);
      }
    }
  }
#if defined(__AMX_BF16__)
  _tile_release();  // or every switch of threads would save them
#endif
}

#define VITLR_JOIN3(a, b, c) a##b##c
#define VITLR_NAME(dtype, isa) VITLR_JOIN3(attention_, dtype, isa)

template <class T>
constexpr AttentionKernel kernel() {
  return {kQueries, T::bytes, room<T>, head<T>};
}

}  // namespace

#if !defined(__AMX_BF16__)  // whose tiles hold bf16 only
const AttentionKernel& VITLR_NAME(fp32_, VITLR_ISA)() {
  static constexpr AttentionKernel table = kernel<Fp32>();
  return table;
}
#endif

const AttentionKernel& VITLR_NAME(bf16_, VITLR_ISA)() {
  static constexpr AttentionKernel table = kernel<Bf16>();
  return table;
}

}  // namespace vitlr
