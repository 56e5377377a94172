// The policy of csrc/cuda/lowrank_body.h on the host: a cluster of Hopper processors, one thread a role (a producer and
// a few warpgroups for each CTA), that follows the PTX ISA's rules and notes every breach of them:
//   - barriers with arrivals, bytes and phases; more arrivals than expected, bytes or arrivals left over, a deadlock
//   - TMA with boxes, zeros outside of the tensor, and the swizzle on absolute addresses, written out here once more
//   - products read shared memory through the bits of their descriptor, and as late as the protocol lets them: when
//     they are waited for. Until then their sums are NaN. A slot that was given back is NaN at once.
//   - bulk stores read as late as they are waited for
//   - what ordinary stores wrote must be fenced before products or bulk stores read it
// Lanes of a warpgroup run one after the other: races among them are not seen.
#pragma once
#include <functional>
#include <random>
#include <thread>

#include "cuda/bounded_wait.h"
#include "emulated_cluster.h"

namespace emulated {

// A barrier as the debug build names it.
inline std::string called(int barrier) {
  const vitlr::cuda::lowrank::BarrierName name = vitlr::cuda::lowrank::barrier_name(barrier);
  return std::string(name.kind) + " " + std::to_string(name.index);
}

template <class T>
class Hopper {
 public:
  using Type = T;
  using Map = emulated::Map;

  template <class V, int N>
  struct Registers {
    Registers() {
      for (auto& lane : values)
        for (V& value : lane) value = static_cast<V>(std::numeric_limits<V>::has_quiet_NaN ? kNaN : 0x7FFF7FFF);
    }
    V* operator()(int lane) { return values[lane]; }
    V values[128][N];
    std::vector<V> under_way;  // the true values, while products are
    int products = 0;
  };

  Hopper(Cluster& cluster, int rank, int warpgroup, int number, int count, unsigned seed)
      : all_(cluster),
        cta_(cluster.ctas[rank]),
        rank_(rank),
        w_(warpgroup),
        number_(number),
        count_(count),
        chance_(seed) {}

  int rank() const { return rank_; }
  int ranks() const { return static_cast<int>(all_.ctas.size()); }
  int cluster() const { return number_; }
  int clusters() const { return count_; }
  int warpgroup() const { return w_; }
  uint32_t address(int offset) const { return kBase + offset; }

  template <class F>
  void lanes(F f) {
    for (int lane = 0; lane < 128; ++lane) f(lane);
  }
  template <class F>
  void once(F f) {
    f();
  }

  void initialise(int barrier, int arrivals) { cta_.barriers[barrier] = {arrivals, arrivals, 0, 0}; }
  void expect(int barrier, int bytes) {
    all_.change([&] {
      cta_.barriers.at(barrier).bytes += bytes;
      arrive(cta_, barrier);
    });
  }
  void arrive_warps(int barrier) {
    pause();
    all_.change([&] {
      for (int warp = 0; warp < 4; ++warp) arrive(cta_, barrier);
    });
  }
  void arrive_at(int rank, int barrier) {
    all_.change([&] { arrive(all_.ctas[rank], barrier); });
  }
  void wait(int barrier, uint32_t parity) {
    pause();
    Barrier& found = cta_.barriers.at(barrier);
    all_.block([&] { return (found.phase & 1) != parity; },
               "barrier " + called(barrier) + " of CTA " + std::to_string(rank_));
  }
  void wait_cluster(int barrier, uint32_t parity) { wait(barrier, parity); }
  void synchronise(int) {}
  void wait_turn(int w) {
    Turn& turn = cta_.turns[w];
    uint64_t seen = 0;
    all_.change([&] {
      seen = turn.rounds;
      ++turn.waiting;
      close(turn);
    });
    all_.block([&] { return turn.rounds != seen; }, "turn of warpgroup " + std::to_string(w));
  }
  void pass_turn(int w) {
    all_.change([&] {
      if (++cta_.turns[w].passed > 1) all_.breach("a turn is passed twice");
      close(cta_.turns[w]);
    });
  }

  void load(const Map& map, int destination, int barrier, int column, int row) {
    load_rows(map, destination, barrier, column, [row](int r) { return row + r; });
  }
  void store(const Map& map, int source, int column, int row) {
    stores_.push_back([=, &map] {
      for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < map.box_columns; ++c) {
          const uint32_t from = physical(address(source) + r * map.box_columns * 2 + c * 2, map.swizzle);
          if (row + r >= map.rows || column + c >= map.columns) continue;
          uint16_t& to = map.data[(row + r) * map.stride + column + c];
          if (decode(to, T{}) == decode(to, T{})) all_.breach("an output is written twice");  // it was NaN
          to = fenced<uint16_t>(from, "a bulk store");
        }
    });
  }
  void commit_stores() {
    store_groups_.push_back(std::move(stores_));
    stores_.clear();
  }
  template <int LEFT>
  void wait_stores() {
    for (; store_groups_.size() > LEFT; store_groups_.erase(store_groups_.begin()))
      for (auto& store : store_groups_.front()) store();
  }
  void fence_async() {
    for (uint32_t at : written_)
      if (cta_.unfenced[at] == w_ + 1) cta_.unfenced[at] = 0;
    written_.clear();
  }

  void store_shared(uint32_t offset, uint32_t value) { store_bytes(offset, &value, 4); }
  uint32_t load_shared(uint32_t offset) {
    uint32_t value;
    std::memcpy(&value, &cta_.shared.at(address(offset)), 4);
    return value;
  }
  void load_shared(uint32_t offset, float* four) { std::memcpy(four, &cta_.shared.at(address(offset)), 16); }
  void load_shared(uint32_t offset, uint32_t* two) { std::memcpy(two, &cta_.shared.at(address(offset)), 8); }
  void send(int rank, uint32_t offset, int barrier, const float* four) { send_bytes(rank, offset, barrier, four, 16); }
  void send(int rank, uint32_t offset, int barrier, const uint32_t* two) { send_bytes(rank, offset, barrier, two, 8); }

  static uint32_t pack(float a, float b) { return encode(a, T{}) | static_cast<uint32_t>(encode(b, T{})) << 16; }
  static Pair unpack(uint32_t two) {
    return {decode(static_cast<uint16_t>(two), T{}), decode(static_cast<uint16_t>(two >> 16), T{})};
  }
  static Pair pair(const void* vector, int index, bool there) {
    if (!there || vector == nullptr) return {0, 0};
    const uint16_t* values = static_cast<const uint16_t*>(vector) + index;
    return {decode(values[0], T{}), decode(values[1], T{})};
  }

  template <class... Used>
  void fence_registers(Used&...) {
    ready_ = true;
  }
  void commit() {
    ready_ = false;
    groups_.push_back(std::move(products_));
    products_.clear();
  }
  template <int LEFT, class... Used>
  void wait_products(Used&...) {
    pause();
    for (; groups_.size() > LEFT; groups_.erase(groups_.begin()))
      for (auto& product : groups_.front()) product();
  }
  template <int N, bool SET = false>
  void multiply(Registers<float, N / 2>& sums, uint64_t A, uint64_t B) {
    multiply_shared<N>(sums, A, B, SET);
  }
  template <int N, bool SET = false, int COUNT>
  void multiply_registers(Registers<float, N / 2>& sums, Registers<uint32_t, COUNT>& A, int first, uint64_t B) {
    if (first % 4 || first + 4 > COUNT) throw std::runtime_error("no such operand registers");
    enqueue<N>(sums, B, SET, [=, &A](Left& a) {
      for (int lane = 0; lane < 128; ++lane)
        for (int i = 0; i < 4; ++i) {
          const Pair two = unpack(A.values[lane][first + i]);
          // Figure "WGMMA .m64nNk16 register fragment layout for matrix A" of the PTX ISA.
          const int row = lane / 32 * 16 + lane % 32 / 4 + (i % 2 ? 8 : 0), k = lane % 4 * 2 + (i < 2 ? 0 : 8);
          a[row][k] = two.x;
          a[row][k + 1] = two.y;
        }
    });
  }

  // Everything that was begun has to be over when a role ends.
  void end() {
    if (!groups_.empty() || !products_.empty()) all_.breach("products are never waited for");
    if (!store_groups_.empty() || !stores_.empty()) all_.breach("bulk stores are never waited for");
  }

 protected:
  static constexpr int kBytes = std::is_same_v<T, E4m3> ? 1 : 2;  // of a number
  static constexpr int kDepth = 32 / kBytes;                      // of a product
  using Left = float[64][kDepth];

  template <int N>
  void multiply_shared(Registers<float, N / 2>& sums, uint64_t A, uint64_t B, bool set) {
    enqueue<N>(sums, B, set, [=](Left& a) {
      for (int row = 0; row < 64; ++row)
        for (int k = 0; k < kDepth; ++k) a[row][k] = operand(A, row, k);
    });
  }
  template <int N, class Make>
  void enqueue(Registers<float, N / 2>& sums, uint64_t B, bool set, Make left) {
    if (!ready_) all_.breach("a product without a fence before it");
    if (sums.products++ == 0) {
      sums.under_way.assign(&sums.values[0][0], &sums.values[0][0] + 128 * (N / 2));
      for (auto& lane : sums.values)
        for (float& value : lane) value = kNaN;
    }
    products_.push_back([this, &sums, B, set, left] {
      static thread_local float a[64][kDepth], b[N][kDepth];
      left(a);
      for (int n = 0; n < N; ++n)
        for (int k = 0; k < kDepth; ++k) b[n][k] = operand(B, n, k);
      for (int lane = 0; lane < 128; ++lane)
        for (int i = 0; i < N / 2; ++i) {
          // Figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D".
          const int row = lane / 32 * 16 + lane % 32 / 4 + (i & 2 ? 8 : 0), column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
          float& sum = sums.under_way[lane * (N / 2) + i];
          float dot = 0;
          for (int k = 0; k < kDepth; ++k) dot += a[row][k] * b[column][k];
          sum = set ? dot : sum + dot;
        }
      if (--sums.products == 0) std::memcpy(&sums.values[0][0], sums.under_way.data(), sums.under_way.size() * 4);
    });
  }
  // A box whose r-th row is that of the matrix which `row_of(r)` says.
  template <class RowOf>
  void load_rows(const Map& map, int destination, int barrier, int column, RowOf row_of) {
    const uint32_t start = address(destination);
    const int row_bytes = map.box_columns * 2;
    if (start % 1024 || row_bytes != map.swizzle) all_.breach("a box of TMA does not lie as its swizzle wants");
    std::memset(&cta_.shared.at(start), 0xFF, map.box_rows * row_bytes);
    pause();
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < map.box_columns; ++c) {
        const bool there = row_of(r) < map.rows && column + c < map.columns;
        const uint16_t value = there ? map.data[row_of(r) * map.stride + column + c] : 0;
        write(physical(start + r * row_bytes + c * 2, map.swizzle), value);
      }
    all_.change([&] { complete(cta_, barrier, map.box_rows * row_bytes); });
  }
  void breach(const std::string& what) { all_.breach(what); }
  void store_bytes(uint32_t offset, const void* value, int bytes) {
    std::memcpy(&cta_.shared.at(address(offset) + bytes - 1) - (bytes - 1), value, bytes);
    for (uint32_t at = address(offset); at < address(offset) + bytes; ++at) {
      cta_.unfenced[at] = static_cast<uint8_t>(w_ + 1);
      written_.push_back(at);
    }
  }

 private:
  static uint32_t physical(uint32_t address, int swizzle) {
    const uint32_t row = address >> 7;
    return address ^ ((row & (swizzle == 128 ? 7 : swizzle == 64 ? 3 : 0)) << 4);
  }
  void write(uint32_t at, uint16_t value) {
    std::memcpy(&cta_.shared.at(at), &value, 2);
    cta_.unfenced[at] = cta_.unfenced[at + 1] = 0;
  }
  template <class V>
  V fenced(uint32_t at, const char* who) {
    if (cta_.unfenced.at(at) || cta_.unfenced.at(at + sizeof(V) - 1))
      all_.breach(std::string(who) + " reads what was stored and not fenced");
    V value;
    std::memcpy(&value, &cta_.shared.at(at), sizeof value);
    return value;
  }
  // The matrix descriptor, PTX ISA "Matrix descriptor format", of a K-major operand.
  float operand(uint64_t descriptor, int row, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int layout = static_cast<int>(descriptor >> 62), row_bytes = layout == 1 ? 128 : 64;
    if (layout == 0 || layout == 3 || (descriptor >> 49 & 7)) all_.breach("a descriptor of no known layout");
    const uint32_t logical = start + row / 8 * stride + row % 8 * row_bytes + k * kBytes;
    using Bits = std::conditional_t<kBytes == 1, uint8_t, uint16_t>;
    return decode(fenced<Bits>(physical(logical, row_bytes), "a product"), T{});
  }
  void send_bytes(int rank, uint32_t offset, int barrier, const void* data, int bytes) {
    all_.change([&] {
      Cta& other = all_.ctas[rank];
      std::memcpy(&other.shared.at(address(offset)), data, bytes);
      complete(other, barrier, bytes);
    });
  }
  void arrive(Cta& cta, int barrier) {
    Barrier& found = cta.barriers.at(barrier);
    if (--found.pending < 0) all_.breach("more arrivals than barrier " + called(barrier) + " expects");
    complete(cta, barrier, 0);
  }
  void complete(Cta& cta, int barrier, int bytes) {
    Barrier& found = cta.barriers.at(barrier);
    found.bytes -= bytes;
    if (found.pending > 0 || found.bytes != 0) return;
    ++found.phase;
    found.pending = found.expected;
    const auto region = cta.poisoned.find(barrier);
    if (region != cta.poisoned.end())
      std::memset(&cta.shared.at(address(region->second.first)), 0xFF, region->second.second);
  }
  static void close(Turn& turn) {
    if (turn.waiting == 1 && turn.passed >= 1) {
      turn.waiting = turn.passed = 0;
      ++turn.rounds;
    }
  }
  void pause() {
    for (unsigned i = chance_() % 4; i > 0; --i) std::this_thread::yield();
  }

  Cluster& all_;
  Cta& cta_;
  const int rank_, w_, number_, count_;
  std::minstd_rand chance_;
  bool ready_ = false;
  std::vector<uint32_t> written_;
  std::vector<std::function<void()>> products_, stores_;
  std::vector<std::vector<std::function<void()>>> groups_, store_groups_;
};

// Runs `clusters` clusters of `ranks` CTAs one after the other; what was breached, empty where nothing was. `initialise(p)`
// of a CTA, `produce(p)` and `consume(p)` are what its threads do.
template <class Tile, class Policy, class Initialise, class Produce, class Consume>
std::string run_roles(int clusters, int ranks, unsigned seed, Initialise initialise, Produce produce, Consume consume) {
  for (int number = 0; number < clusters; ++number) {
    Cluster cluster(ranks, ranks * (1 + Tile::WARPGROUPS));
    for (int rank = 0; rank < ranks; ++rank) {
      Policy first(cluster, rank, 0, number, clusters, seed);
      initialise(first);
      for (int i = 0; i < Tile::slots; ++i)
        cluster.ctas[rank].poisoned[Tile::empty(i)] = {Tile::slot(i), Tile::slot_bytes};
    }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
      for (int w = -1; w < Tile::WARPGROUPS; ++w)
        threads.emplace_back([&, rank, w] {
          try {
            Policy p(cluster, rank, w, number, clusters, seed + 977 * (number * 64 + rank * 8 + w + 1));
            if (w < 0)
              produce(p);
            else
              consume(p);
            p.end();
          } catch (const std::exception& cause) {
            cluster.breach(cause.what());
          }
          cluster.leave();
        });
    for (std::thread& thread : threads) thread.join();
    for (Cta& cta : cluster.ctas) {
      for (auto& [offset, barrier] : cta.barriers)
        if (barrier.pending != barrier.expected || barrier.bytes != 0)
          cluster.breach("barrier " + called(offset) + " is left in the middle of a phase");
      for (Turn& turn : cta.turns)
        if (turn.waiting || turn.passed) cluster.breach("a turn is left over");
    }
    if (!cluster.breaches.empty())
      return cluster.breaches.front() + " (" + std::to_string(cluster.breaches.size()) + " breaches)";
  }
  return "";
}

}  // namespace emulated
