// Memory of one thread, kept between calls: fresh memory costs a page fault for every 4 KiB.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace vitlr {

struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  // At least `bytes`, aligned to 64; what was there before is lost. Null without memory.
  char* reserve(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64));
      size = data ? bytes : 0;
    }
    return data;
  }
};
inline thread_local Scratch scratch;
inline thread_local Scratch between;  // of what lies between calls that each use the other one

}  // namespace vitlr
