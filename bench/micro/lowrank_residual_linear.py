"""`A (B x) + R x + b` against the dense linear it replaces, and every candidate against plain torch.

    python -m bench.micro.lowrank_residual_linear [--dtype bfloat16] [--images 1 8 64] [--json FILE]

On the GPU that is there, else on the CPU. All take turns in one process (`timing.compare`), on random data, after
each was held against fp64; a kernel that is wrong stops the script. On a GPU every function is one CUDA graph over
enough copies of x to go past the L2 cache. Printed: microseconds (least of all rounds), the floor where the device's
ceilings are known, and the ratio to `F.linear` with the dense weight in the same dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from bench.common import VIT_B, finish, parser
from vitlr import ops
from vitlr.measuring.timing import compare
from vitlr.nn import ResidualLowRankLinear
from vitlr.ops.dispatch.ceilings import ceilings_of
from vitlr.ops.layers.lowrank_residual_linear import OP, Key, reference, roofline

TOKENS, GROUPS = 197, {"int8": 64, "int4": 64, "fp8": 64, "blockdiag": 192}
PAST_CACHE = 128 * 2**20  # bytes of x that are walked through; the largest L2 we know of has 60 MiB


def check(name: str, y: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No number is printed for a kernel that is wrong."""
    error, allowed = (y.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max() + 1e-6
    if not error <= allowed:
        sys.exit(f"{name} is off by {error:.2e}, allowed {allowed:.2e}: not timed")


def repeated(function: Callable[[Tensor], Tensor], copies: list[Tensor]) -> Callable[[], None]:
    """Runs over the copies of x in turn; on a GPU as one graph."""

    def run() -> None:
        for each in copies:
            function(each)

    if not copies[0].is_cuda:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@torch.no_grad()
def main() -> None:
    args = parser(__doc__)
    args.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"), help="of x")
    args.add_argument("--images", type=int, nargs="+", default=[1, 64], help="197 rows each")
    args.add_argument("--ranks", type=int, nargs="+", default=[32], help="r")
    args.add_argument("--forms", nargs="+", default=list(GROUPS), choices=list(GROUPS), help="of the residual")
    args.add_argument("--layers", nargs="+", default=list(VIT_B), choices=list(VIT_B), help="of ViT-B")
    args.add_argument("--repeats", type=int, default=10, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, given.dtype)
    rows = []
    for layer, images, form, r in product(given.layers, given.images, given.forms, given.ranks):
        (N, K), group, M = VIT_B[layer], GROUPS[form], TOKENS * images
        low = ResidualLowRankLinear(K, N, r, form, group, device=device, dtype=dtype)
        low.codes.copy_(torch.randint(0, 100, low.codes.shape, device=device))
        if low.scale is not None:
            low.scale.fill_(1e-4)
        else:
            low.codes.mul_(1e-4)
        parts = (low.down.weight, low.up.weight, low.codes, low.scale, low.up.bias, form, group)
        x, dense = torch.randn(M, K, device=device, dtype=dtype), low.to_linear()
        key = Key(M, K, N, r, form, group, True, dtype, device)
        able = [candidate for candidate in ops.candidates(OP) if candidate.supports(key) is None]
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in parts[:5]]
        exact, plain = reference(x.double(), *wide, form, group), reference(x, *parts)
        copies = [x.clone() for _ in range(min(64, 1 + PAST_CACHE // x.nbytes) if x.is_cuda else 1)]
        functions = {"dense": repeated(lambda x, dense=dense: dense(x), copies)}
        for candidate in able:
            check(candidate.name, candidate.run(x, *parts), plain, exact)
            functions[candidate.name] = repeated(lambda x, run=candidate.run, parts=parts: run(x, *parts), copies)
        times = compare(functions, repeats=given.repeats, device=device)
        us = {name: 1e6 * timing.min / len(copies) for name, timing in times.items()}
        floor = roofline(key, ceilings_of(device)).floor_us
        told = ", ".join(f"{name} {t:.1f} µs ({us['dense'] / t:.2f}x dense)" for name, t in us.items())
        print(f"{layer:9} M={M:5} r={r:3} {form:9} floor {'unknown' if floor is None else f'{floor:.1f} µs'}: {told}")
        rows.append({"layer": layer, "M": M, "r": r, "form": form, "floor_us": floor, "us": us})
    finish("lowrank_residual_linear", {"dtype": given.dtype, "rows": rows}, given.json)


if __name__ == "__main__":
    main()
