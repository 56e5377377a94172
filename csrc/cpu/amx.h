// Products of blocks with panels in the tile registers of AMX, of bytes or of bf16: 32 rows by 32 columns at a time.
//
// The layouts are those of the vectors: sixteen words of a block's row are a row of a tile, and so are sixteen columns of
// a word of a panel, which TDPBUSD multiplies to int32 and TDPBF16PS to fp32.
#pragma once
#include "cpu/bytes.h"

namespace vitlr {
namespace {

constexpr int64_t kTile = 16;  // rows, and words of a row, of a tile

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC does not know what memory tiles are loaded from: this has all of it written.
inline void written() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums, 4 and 5 the block's rows, 6 and 7 the panel's columns. Sets the shapes for `rows` rows.
inline void shape_tiles(int64_t rows) {
  const uint8_t first = static_cast<uint8_t>(smaller(rows, kTile)), second = static_cast<uint8_t>(rows - first);
  const uint8_t shapes[8] = {first, first, second, second, first, second, 16, 16};
  TileShapes config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = shapes[i];
    config.row_bytes[i] = shapes[i] ? 64 : 0;
  }
  written();
  _tile_loadconfig(&config);
}

// Tile C += tile A x tile B. Which tiles is a part of the instruction.
#define VITLR_MULTIPLY(C, A, B)      \
  do {                               \
    if constexpr (T::elements == 2)  \
      _tile_dpbf16ps(C, A, B);       \
    else                             \
      _tile_dpbusd(C, A, B);         \
  } while (false)

// sums [.][kColumns] of int32 or fp32 (+)= block x panel over the words of one chunk.
template <class T, bool LOWER, bool RIGHT>
void multiply_tiles(const Word* block, int64_t words, const Word* panel, Word* sums, bool add) {
  constexpr int64_t width = RIGHT ? 2 * kTile : kTile;
  Word* const lower = sums + kTile * kColumns;
  written();
  if (add) {
    _tile_loadd(0, sums, kColumns * 4);
    if (RIGHT) _tile_loadd(1, sums + kTile, kColumns * 4);
    if (LOWER) _tile_loadd(2, lower, kColumns * 4);
    if (LOWER && RIGHT) _tile_loadd(3, lower + kTile, kColumns * 4);
  } else {
    _tile_zero(0);
    if (RIGHT) _tile_zero(1);
    if (LOWER) _tile_zero(2);
    if (LOWER && RIGHT) _tile_zero(3);
  }
  for (int64_t k = 0; k < words; k += kTile, panel += kTile * width) {
    _tile_loadd(6, panel, width * 4);
    _tile_loadd(4, block + k, kChunk * 4);
    VITLR_MULTIPLY(0, 4, 6);
    if (LOWER) {
      _tile_loadd(5, block + kTile * kChunk + k, kChunk * 4);
      VITLR_MULTIPLY(2, 5, 6);
    }
    if (RIGHT) {
      _tile_loadd(7, panel + kTile, width * 4);
      VITLR_MULTIPLY(1, 4, 7);
      if (LOWER) VITLR_MULTIPLY(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kColumns * 4);
  if (RIGHT) _tile_stored(1, sums + kTile, kColumns * 4);
  if (LOWER) _tile_stored(2, lower, kColumns * 4);
  if (LOWER && RIGHT) _tile_stored(3, lower + kTile, kColumns * 4);
}

// sums [rows][kColumns] of int32 = block x panel of bytes, whose last words meet zeros. Chunk by chunk: that of the panel,
// 16 KiB, stays in L1 for all rows, since tiles eat 64 bytes a cycle, twice what L2 gives.
inline void multiply_block(const Word* block, int64_t rows, int64_t words, const Word* panel, Word* sums, bool wide) {
  int64_t shaped = 0;
  for (int64_t k = 0; k < words; k += kChunk) {
    const int64_t depth = smaller(kChunk, words - k);
    for (int64_t m = 0; m < rows; m += 2 * kTile) {
      const int64_t count = smaller(2 * kTile, rows - m);
      if (count != shaped) shape_tiles(shaped = count);
      const auto multiply = count > kTile ? (wide ? multiply_tiles<Int8, true, true> : multiply_tiles<Int8, true, false>)
                                          : (wide ? multiply_tiles<Int8, false, true> : multiply_tiles<Int8, false, false>);
      multiply(block + k * rows + m * kChunk, depth, panel + k * (wide ? kColumns : kLanes), sums + m * kColumns, k > 0);
    }
  }
  _tile_release();  // or every switch of threads would save them
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
