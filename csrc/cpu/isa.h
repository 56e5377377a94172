// Instruction sets that kernels are compiled for, and the one in use.
#pragma once

namespace vitlr {

// From the plainest to the best. Each runs wherever the next one does, but AVX-VNNI, which not every CPU with AVX-512 has.
// Where an operation has nothing of its own for one, the next plainer one serves.
enum Isa { kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxInt8 };

// The instruction set by name, or the best that was built and that this CPU runs if `name` is empty; throws
// std::invalid_argument for any other.
Isa select_isa(const char* name);

const char* name_of(Isa isa);

}  // namespace vitlr
