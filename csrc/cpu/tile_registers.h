// The tile registers of AMX and their shapes; included only by files that are compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace vitlr {
namespace {

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC does not know what memory tiles are loaded from: this has all of it written.
inline void written() { __asm__ volatile("" ::: "memory"); }

// Tile i of rows[i] rows of 64 bytes, or not there.
inline void shape_tiles(const uint8_t (&rows)[8]) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = rows[i];
    shapes.row_bytes[i] = rows[i] ? 64 : 0;
  }
  written();
  _tile_loadconfig(&shapes);
}

}  // namespace
}  // namespace vitlr
