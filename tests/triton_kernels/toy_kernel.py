"""A toy kernel, compiled in a process of its own: prints as JSON what is a problem with it under which bounds."""

from __future__ import annotations

import json
from dataclasses import replace

import triton
import triton.language as tl

from vitlr.triton_kernels.compilation import Case, compile_case
from vitlr.triton_kernels.targets import TARGETS

SM_80 = TARGETS["sm_80"]


@triton.jit
def square(x, y, SIZE: tl.constexpr, MULTIPLY: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = tl.load(x + i[:, None] * SIZE + i[None, :])
    if MULTIPLY:
        tile = tl.dot(tile, tile)
    tl.store(y + i[:, None] * SIZE + i[None, :], tile)


def main() -> None:
    constants = {"SIZE": 64, "MULTIPLY": True}
    case = Case(
        "square", square, {"x": "*fp16", "y": "*fp32"}, constants, 4, 1, {"sm_80": 255}, ("x", "y"), shared=32768
    )
    told = {
        "within": case,
        "registers": replace(case, registers={"sm_80": 16}),
        "shared": replace(case, shared=1000),
        "spill": replace(case, constants={**constants, "SIZE": 128}, num_warps=1),
        "tensor cores": replace(case, constants={**constants, "MULTIPLY": False}),
    }
    found = {name: compile_case(one, SM_80).problems for name, one in told.items()}
    found["memory"] = compile_case(case, replace(SM_80, shared_memory=1000)).problems
    try:
        compile_case(replace(case, types={"x": "*fp16"}), SM_80)
    except ValueError as cause:
        found["argument"] = (str(cause),)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
