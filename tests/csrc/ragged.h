// What the checks of CPU kernels share: shapes drawn from a seed, and all instruction sets and dtypes in turn.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <stdexcept>

#include "cpu/isa.h"

namespace vitlr {

inline std::mt19937 generator(0);

inline int64_t pick(std::initializer_list<int64_t> choices) {
  return choices.begin()[std::uniform_int_distribution<size_t>(0, choices.size() - 1)(generator)];
}

// `check(isa, bf16, round)` for as many rounds as the command line says, 20 by itself; the program's exit status.
template <class Check>
int check_all(int argc, char** argv, Check check) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  const Isa best = select_isa("");
  for (int isa = kPortable; isa <= best; ++isa) {
    try {
      select_isa(name_of(static_cast<Isa>(isa)));
    } catch (const std::invalid_argument&) {
      continue;  // AVX-VNNI, which this CPU may lack although it has better
    }
    for (bool bf16 : {false, true})
      for (int round = 0; round < rounds; ++round)
        if (!check(static_cast<Isa>(isa), bf16, round)) return 1;
  }
  std::printf("checked up to %s\n", name_of(best));
  return 0;
}

}  // namespace vitlr
