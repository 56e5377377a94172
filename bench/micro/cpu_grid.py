"""Where the CPU kernels pay: `python -m bench.micro.cpu_grid [--ops linear mlp residual] [--threads N] [--all]`.

Widths of ViT-Ti to ViT-L, 50 to 1576 rows, fp32 and bf16. For every call that dispatch gives to the CPU kernel
(`--all`: every call that it can run) the time of plain torch over the op's, in turns in one process, least of all
rounds; for residual layers also that of the dense layer in fp32 and in bf16. The rules in
`vitlr/ops/backends/cpu.py` rest on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import calls
from bench.cases.calls import Call
from bench.common import finish, parser
from vitlr.measuring.timing import compare
from vitlr.ops.dispatch import registry

CPU = torch.device("cpu")
LINEARS = (
    *((192, 576), (192, 768), (384, 384), (384, 1152), (1536, 384)),
    *((768, 768), (768, 2304), (3072, 768), (1024, 4096)),
)
RANKS = {192: (16, 48, 96), 384: (32, 96, 160), 768: (64, 224), 1024: (64, 224)}


def grid(op: str, dtype: torch.dtype) -> Iterator[tuple[Call, int, int, int]]:
    """Calls with their rows and the sizes K, N of the dense layer."""
    if op == "mlp":
        for K, ranks in RANKS.items():
            for r in ranks:
                yield from ((calls.mlp(M, K, 4 * K, K, r, r, dtype, CPU), M, K, 4 * K) for M in (50, 197, 1576))
        return
    for K, N in LINEARS:
        for M in (197, 1576):
            if op == "linear":
                ranks = [r for r in (32, 64, 128, 208, 256) if r * (K + N) < K * N]
                yield from ((calls.linear(M, K, N, r, dtype, CPU), M, K, N) for r in ranks)
            else:
                for form in ("int8", "int4"):
                    yield from ((calls.residual_linear(M, K, N, r, form, 64, dtype, CPU), M, K, N) for r in (16, 32))


def ratios(call: Call, M: int, K: int, N: int, dense: bool, repeats: int) -> dict[str, float]:
    """Times of plain torch, and of the dense layer where asked for, over that of the op."""
    args = call.make(0)
    op = getattr(torch.ops.vitlr, call.op).default
    functions: dict[str, Callable[[], Any]] = {"op": lambda: op(*args), "torch": lambda: call.reference()(*args)}
    if dense:
        for dtype in (torch.float32, torch.bfloat16):
            new = calls.Random(1, dtype, CPU)
            x, W, b = new(M, K), new(N, K, fan_in=K), new(N)
            functions[f"dense {dtype}"] = lambda x=x, W=W, b=b: F.linear(x, W, b)
    times = compare(functions, repeats=repeats)
    return {name: round(t.min / times["op"].min, 3) for name, t in times.items() if name != "op"}


@torch.no_grad()
def main() -> None:
    args = parser(__doc__ or "")
    args.add_argument("--ops", nargs="+", default=["linear", "mlp", "residual"], choices=["linear", "mlp", "residual"])
    args.add_argument("--all", action="store_true", help="also where dispatch takes plain torch")
    args.add_argument("--repeats", type=int, default=10, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for op in given.ops:
        for dtype in (torch.float32, torch.bfloat16):
            for call, *sizes in grid(op, dtype):
                key = call.key(call.make(0))
                kernel = next(c for c in registry.candidates(call.op) if c.name == "cpu")
                if kernel.supports(key) is not None or not (given.all or registry.select(call.op, key) is kernel):
                    continue
                found = ratios(call, *sizes, dense=op == "residual", repeats=given.repeats)
                rows.append({"op": call.op, "call": call.label, "times_as_fast_as": found})
                print(f"{call.op} {call.label}: {', '.join(f'{ratio:.2f}x {name}' for name, ratio in found.items())}")
    finish("cpu grid", {"rows": rows}, given.json)


if __name__ == "__main__":
    main()
