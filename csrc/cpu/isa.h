// Instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace vitlr {

enum Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };  // each runs wherever the next one does

// The instruction set by name, or the best that was built and that this CPU runs if `name` is empty; throws
// std::invalid_argument for any other.
Isa select_isa(const char* name);

const char* name_of(Isa isa);

}  // namespace vitlr
