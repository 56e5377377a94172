// Products of blocks with panels in the tile registers of AMX, of bytes or of bf16: 32 rows by 32 columns at a time.
//
// The layouts are those of the vectors: a chunk of a block's row is a row of a tile, and so are sixteen columns of a word
// of a panel, which TDPBUSD multiplies to int32 and TDPBF16PS to fp32.
#pragma once
#include "cpu/bytes.h"
#include "cpu/tile_registers.h"

namespace vitlr {
namespace {

constexpr int64_t kTile = 16;  // rows, and words of a row, of a tile
static_assert(kTile == kChunk, "a row of a tile is a chunk of a row");

// Tiles 0 to 3 are sums, 4 and 5 the block's rows, 6 and 7 the panel's columns. Sets the shapes for `rows` rows.
inline void shape_tiles(int64_t rows) {
  const uint8_t first = static_cast<uint8_t>(smaller(rows, kTile)), second = static_cast<uint8_t>(rows - first);
  const uint8_t shapes[8] = {first, first, second, second, first, second, 16, 16};
  shape_tiles(shapes);
}

// Tile C += tile A x tile B. Which tiles is a part of the instruction.
#define VITLR_MULTIPLY(C, A, B)      \
  do {                               \
    if constexpr (T::elements == 2)  \
      _tile_dpbf16ps(C, A, B);       \
    else                             \
      _tile_dpbusd(C, A, B);         \
  } while (false)

// What is done between two steps of a product: nothing.
struct Nothing {
  void operator()() const {}
};

// Tile = sixteen rows of a block. Those of bytes pass L1 by: they are read once a panel, and would drive the panel out of
// it, which is read for every group of rows.
#define VITLR_LOAD_ROWS(TILE, ROWS)                \
  do {                                             \
    if constexpr (T::elements == 4)                \
      _tile_stream_loadd(TILE, ROWS, kTile * 4);   \
    else                                           \
      _tile_loadd(TILE, ROWS, kTile * 4);          \
  } while (false)

// sums [.][kColumns] of int32 or fp32 (+)= rows of a block of `rows` x panel, over some of the words of both. `between` is
// called before every sixteen words but the first, which keep the tiles busy for 64 cycles and the vector units not at all.
template <class T, bool LOWER, bool RIGHT, class Between>
void multiply_tiles(const Word* block, int64_t rows, int64_t words, const Word* panel, Word* sums, bool add, Between&& between) {
  constexpr int64_t width = RIGHT ? 2 * kTile : kTile;
  Word *const right = sums + kTile, *const lower = sums + kTile * kColumns, *const last = lower + kTile;
  written();
  if (add) {
    _tile_loadd(0, sums, kColumns * 4);
    if (RIGHT) _tile_loadd(1, right, kColumns * 4);
    if (LOWER) _tile_loadd(2, lower, kColumns * 4);
    if (LOWER && RIGHT) _tile_loadd(3, last, kColumns * 4);
  } else {
    _tile_zero(0);
    if (RIGHT) _tile_zero(1);
    if (LOWER) _tile_zero(2);
    if (LOWER && RIGHT) _tile_zero(3);
  }
  for (int64_t k = 0; k < words; k += kTile, block += kTile * rows, panel += kTile * width) {
    if (k) between();
    _tile_loadd(6, panel, width * 4);
    VITLR_LOAD_ROWS(4, block);
    VITLR_MULTIPLY(0, 4, 6);
    if (LOWER) {
      VITLR_LOAD_ROWS(5, block + kTile * kTile);
      VITLR_MULTIPLY(2, 5, 6);
    }
    if (RIGHT) {
      _tile_loadd(7, panel + kTile, width * 4);
      VITLR_MULTIPLY(1, 4, 7);
      if (LOWER) VITLR_MULTIPLY(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kColumns * 4);
  if (RIGHT) _tile_stored(1, right, kColumns * 4);
  if (LOWER) _tile_stored(2, lower, kColumns * 4);
  if (LOWER && RIGHT) _tile_stored(3, last, kColumns * 4);
  written();
}

// The same for `count` rows, in tiles of that shape, and `columns` of the panel.
template <class T, class Between>
inline void multiply_tiles(const Word* block, int64_t rows, int64_t words, const Word* panel, Word* sums, bool add,
                           int64_t count, int64_t columns, Between&& between) {
  const bool lower = count > kTile, right = columns > kTile;
  if (lower && right) return multiply_tiles<T, true, true>(block, rows, words, panel, sums, add, between);
  if (lower) return multiply_tiles<T, true, false>(block, rows, words, panel, sums, add, between);
  if (right) return multiply_tiles<T, false, true>(block, rows, words, panel, sums, add, between);
  multiply_tiles<T, false, false>(block, rows, words, panel, sums, add, between);
}

inline double peak_of_tiles(int64_t rounds) {
  alignas(64) static constexpr int8_t ones[kTile * 64] = {};
  shape_tiles(2 * kTile);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 4 * kTile * kTile * 64 * static_cast<double>(rounds);
}

}  // namespace
}  // namespace vitlr
