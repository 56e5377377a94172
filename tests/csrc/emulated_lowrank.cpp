// The low-rank kernels for Hopper, emulated: a library that test_cuda_lowrank.py builds and calls with tensors of
// torch.
#include <cstdio>

#include "cuda/lowrank_body.h"
#include "cuda/lowrank_sm90.h"
#include "emulated_hopper.h"

using namespace vitlr::cuda::lowrank;

namespace {

template <class T, bool MLP, class Type>
std::string run(const LowrankParams& p, const Plan& plan, unsigned seed) {
  const auto encode = [](const Matrix& m, int rows, int columns, int box_rows, int box_columns) {
    uint16_t* data = static_cast<uint16_t*>(const_cast<void*>(m.data));
    return emulated::Map{data, rows, columns, m.stride, box_rows, box_columns, box_columns * 2};
  };
  const auto maps = maps_of<T, emulated::Map>(p, encode);
  const Sizes sizes = sizes_of(p, plan);
  using Policy = emulated::Hopper<Type>;
  return emulated::run_roles<T, Policy>(
      plan.clusters, plan.ranks, seed, [](Policy& policy) { initialise<T>(policy); },
      [&](Policy& policy) { produce<T, MLP>(policy, sizes, maps); },
      [&](Policy& policy) { Consumer<T, MLP, Policy>(policy, sizes, maps).run(); });
}

template <class T, bool MLP>
std::string run(const LowrankParams& p, const Plan& plan, unsigned seed) {
  return p.fp16 ? run<T, MLP, Fp16>(p, plan, seed) : run<T, MLP, Bf16>(p, plan, seed);
}

template <bool MLP>
std::string find(const LowrankParams& p, const Plan& plan, unsigned seed) {
  std::string told = "no such tile";
  each_tile<MLP>([&](auto tile) {
    using T = decltype(tile);
    if (T::R == plan.R && T::WARPGROUPS == plan.warpgroups) told = run<T, MLP>(p, plan, seed);
  });
  return told;
}

}  // namespace

// `plan`: R, warpgroups, ranks, clusters, groups; R = 0 asks for the plan of so many processors (warpgroups), and tells
// it.
extern "C" void emulate(const LowrankParams* p, int* plan, double* microseconds, unsigned seed, char* told, int size) {
  if (plan[0] == 0) {
    const Plan found = vitlr::cuda::lowrank::plan(*p, plan[1]);
    const int values[5] = {found.R, found.warpgroups, found.ranks, found.clusters, found.groups};
    std::memcpy(plan, values, sizeof values);
    *microseconds = found.microseconds;
    told[0] = 0;
    return;
  }
  const Plan given{plan[0], plan[1], plan[2], plan[3], plan[4], 0};
  const std::string breach = p->mlp() ? find<true>(*p, given, seed) : find<false>(*p, given, seed);
  std::snprintf(told, size, "%s", breach.c_str());
}

// y[i] = the activation of x[i] as the kernels compute it.
extern "C" void activations(int act, bool fp16, const float* x, float* y, int64_t count) {
  with_activation(static_cast<Act>(act), [&](auto choice) {
    for (int64_t i = 0; i < count; ++i)
      y[i] = fp16 ? activate<choice.act>(x[i], Fp16{}) : activate<choice.act>(x[i], Bf16{});
  });
}

// How often a bounded wait asks until it passes, by a clock of `tick` ns a reading; 0 where it gives up. `opens`: the
// barrier opens at that asking.
extern "C" int bounded_wait(int opens, uint64_t tick, uint64_t patience) {
  uint64_t now = 0;
  int asked = 0;
  const bool passed = passes_in_time([&] { return ++asked >= opens; }, [&] { return now += tick; }, patience);
  return passed ? asked : 0;
}

// What the debug build says of its note.
extern "C" void hang(int block, int warp, int barrier, int parity, char* said, int size) {
  std::snprintf(said, size, "%s", told({1, block, warp, barrier, parity}).c_str());
}
