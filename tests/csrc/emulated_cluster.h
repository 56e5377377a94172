// A cluster of Hopper processors as emulated_hopper.h uses it: numbers of 16 bits, tensor maps, barriers, shared
// memory, and threads that block until something changes; when all of them are blocked, that is a deadlock.
#pragma once
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/lowrank_tile.h"

namespace emulated {

using vitlr::cuda::lowrank::Bf16;
using vitlr::cuda::lowrank::E4m3;
using vitlr::cuda::lowrank::Fp16;

constexpr uint32_t kBase = 1024;  // where shared memory that a kernel is given starts
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Pair {
  float x, y;
};

inline uint16_t encode(float value, Bf16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float decode(uint16_t half, Bf16) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t encode(float value, Fp16) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float decode(uint16_t bits, Fp16) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

// Bytes: three bits of mantissa, an exponent of four that is 7 above, no infinities, NaN where all bits are one.
inline float decode(uint8_t byte, E4m3) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return (byte & 0x7F) == 0x7F ? kNaN : byte & 0x80 ? -size : size;
}
inline uint8_t encode(float value, E4m3) {
  if (value != value) return 0x7F;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(value), 448.0f);
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -6, -6);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // ties to even
  return sign | static_cast<uint8_t>(steps < 8 ? steps : ((exponent + 7) << 3) + steps - 8);
}
// The first of two bytes that TMA moves at once.
inline float decode(uint16_t two, E4m3) { return decode(static_cast<uint8_t>(two & 0xFF), E4m3{}); }

// What cuTensorMapEncodeTiled is told: a row-major matrix of 16-bit values, a box, a swizzle of so many bytes.
struct Map {
  uint16_t* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns, swizzle;
};

struct Barrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Turn {
  int waiting = 0, passed = 0;
  uint64_t rounds = 0;
};

struct Cta {
  std::vector<uint8_t> shared = std::vector<uint8_t>(kBase + vitlr::cuda::lowrank::kSharedMemory, 0xFF);
  std::vector<uint8_t> unfenced = std::vector<uint8_t>(shared.size(), 0);  // by which warpgroup
  std::map<int, Barrier> barriers;
  std::map<int, std::pair<int, int>> poisoned;  // barrier: what is NaN once it completes
  Turn turns[3];
};

struct Deadlock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Cluster {
 public:
  Cluster(int ranks, int threads) : ctas(ranks), active_(threads) {}

  void breach(const std::string& what) {
    const std::lock_guard<std::mutex> hold(notes_);
    if (breaches.size() < 20) breaches.push_back(what);
  }
  template <class Change>
  void change(Change f) {
    const std::lock_guard<std::mutex> hold(mutex_);
    f();
    wake();
  }
  template <class Until>
  void block(Until until, const std::string& what) {
    std::unique_lock<std::mutex> hold(mutex_);
    while (!until()) {
      if (--active_ == 0) stuck_ = true;
      ++blocked_;
      if (stuck_) {
        condition_.notify_all();
        throw Deadlock("deadlock at " + what);
      }
      const uint64_t seen = changes_;
      condition_.wait(hold, [&] { return changes_ != seen || stuck_; });
      if (stuck_) throw Deadlock("deadlock at " + what);
    }
  }
  void leave() {
    const std::lock_guard<std::mutex> hold(mutex_);
    if (--active_ == 0 && blocked_ > 0) {
      stuck_ = true;
      condition_.notify_all();
    }
  }

  std::vector<Cta> ctas;
  std::vector<std::string> breaches;

 private:
  void wake() {
    active_ += blocked_;
    blocked_ = 0;
    ++changes_;
    condition_.notify_all();
  }
  std::mutex mutex_, notes_;
  std::condition_variable condition_;
  int active_, blocked_ = 0;
  uint64_t changes_ = 0;
  bool stuck_ = false;
};

}  // namespace emulated
