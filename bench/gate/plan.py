"""What the two windows on a GPU do, in which order, and the seconds that each thing may take.

Window 1 asks what is right, simplest first, and times the MLPs that decide whether the kernels are worth having.
Window 2 knows what window 1 found: it times the rest, tunes, and runs whole models. Seconds are guesses for a machine
with 16 cores; a phase that takes longer is cut off, one that is quicker leaves its time to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.cases import calls
from bench.cases.calls import Call
from bench.cases.shapes import geometry
from bench.gate import lines
from bench.gate.checks import (
    BF16,
    BUILD,
    BYTE_MLPS,
    FORMS,
    FP8,
    FP32,
    INT8,
    LINEAR,
    MLP,
    RANKS,
    byte_mlp,
    check,
    cuda_groups,
    glu,
    linear,
    mlp,
    triton_groups,
)
from bench.gate.lines import Line
from bench.gate.models import NAMES
from bench.gate.tasks import Group, Phase, Task, Window

DEBUG_BUILD = f"{BUILD}, debug"


def build(debug: bool = False) -> Group:
    """nvcc for sm_90a alone, beside everything else."""
    label = DEBUG_BUILD.removeprefix("build ") if debug else BUILD.removeprefix("build ")
    return Group(
        "nvcc",
        [Task("build", label, given={"debug": debug}, deadline=150, seconds=30, anew=True)],
        background=not debug,
    )


def _ceilings() -> Group:
    return Group("ceilings", [Task("ceilings", "copy and 8192-cubed product", deadline=40, seconds=4, anew=True)])


BOUNDED = ("cuda.sm90", "cuda.cluster", "cuda.bytes", "cuda.mlp")  # whose waits the debug build bounds


def bisection(found: Sequence[Line], tasks: Sequence[Task]) -> list[Group]:
    """What ended a process or was wrong on a kernel of Hopper's, once more in the debug build, the first four."""
    bad = {line["id"]: line for line in lines.faults(found) if line["candidate"] in BOUNDED}
    again = [task for task in tasks if task.id in bad][:4]
    if not again:
        return []
    named = [
        Task("debug", task.call, task.op, f"{task.candidate} debug", task.dtype, task.given, task.deadline, 3.0)
        for task in again
    ]
    return [build(debug=True), Group("debug build", named, DEBUG_BUILD)]


def row(call: Call, dense: str = "", rivals: Sequence[str] = (), seconds: float = 1.5, **given: object) -> Task:
    """Times of everything that can run a call, and of its rivals (rivals.py)."""
    wanted = {"call": call, "dense": dense, "rivals": tuple(rivals), **given}
    beside = ", torch.compile beside it" if COMPILED_RIVALS[0] in rivals else ""
    return Task("row", call.label + beside, call.op, "", call.dtype, wanted, 45.0, seconds)


EPILOGUES = ("dense", "dense epilogue", "torch epilogue")
COMPILED_RIVALS = ("dense compiled", "torch compiled")
FP8_RIVAL = "dense fp8 compiled"


def mlp_row(call: Call, seconds: float, compiled: bool = False) -> Task:
    """An MLP against the dense one, both also with cuBLASLt's GELU, and in window 2 against torch.compile."""
    rivals = (*EPILOGUES, *COMPILED_RIVALS * compiled)
    return row(call, "mlp", rivals, seconds)


def byte_row(op: str, M: int, form: int | str, device: torch.device, seconds: float) -> Task:
    """The MLP of a block in bytes against the dense one in bf16 and in fp8, and against four products of bf16."""
    four = ("four epilogue",) if isinstance(form, int) else ()
    return row(byte_mlp(op, M, form, device), "mlp", ("dense", "dense epilogue", *four, FP8_RIVAL), seconds)


def window_one(device: torch.device) -> Window:
    """What is right, and the first times."""
    cuda, triton = cuda_groups(device), triton_groups(device)
    whole = Group("whole", [Task("whole", "calibration and plan of a ViT-B", deadline=90, seconds=30)])
    checks = [build(), whole, *triton[:1], *cuda, *triton[1:]]
    timed = [mlp_row(mlp(M, r, device), 3.0 if M < 20000 else 5.0) for M in (12608, 50432) for r in RANKS]
    timed += [row(byte_mlp(FP8, 12608, 224, device), "mlp", ("dense", "dense epilogue", "four epilogue"), 2.5)]
    timed += [mlp_row(mlp(197, r, device), 2.0) for r in RANKS]
    timed += [row(linear(layer, 12608, 128, device), "linear", ("dense",), 1.5) for layer in ("fc1", "fc2", "qkv")]
    timed += [mlp_row(mlp(1576, r, device), 2.0) for r in RANKS]
    every = [task for group in cuda for task in group.tasks]
    return Window(
        "window 1",
        [
            Phase("ceilings", 10, lambda found: [_ceilings()]),
            Phase("checks", 125, lambda found: checks, lanes=8),
            Phase("bisection", 45, partial(bisection, tasks=every)),
            Phase("times", 80, lambda found: [Group("times", timed)]),
        ],
    )


def grid(device: torch.device) -> list[Task]:
    """Rows of window 2 after those of MLPs: ViT-B's linears, then other operations and models."""
    rows = [
        row(linear(layer, M, r, device), "linear", ("dense",), 0.8)
        for M in (12608, 197)
        for r in (128, 224)
        for layer in ("fc1", "fc2", "qkv", "proj")
    ]
    for M in (197, 12608):
        rows += [
            row(calls.residual_linear(M, 768, 2304, 32, *form, BF16, device), "linear", ("dense",), 1.0)
            for form in FORMS
            if form[0] in ("int8", "fp8")
        ]
    for model, r in (("small", 64), ("large", 192), ("huge", 192)):
        g = geometry({"huge": "vit_huge_patch14_224"}.get(model, f"vit_{model}_patch16_224"))
        call = calls.mlp(64 * g.tokens, g.width, g.hidden, g.width, r, r, BF16, device)
        rows.append(mlp_row(call, 2.5))
    rows += [row(glu(packed, device), seconds=1.5) for packed in (True, False)]
    rows += [row(calls.chain(48, 768, 768, dtype, device), seconds=1.0) for dtype in (torch.float64, FP32)]
    return [*rows, *byte_rows(device)]


def byte_rows(device: torch.device) -> list[Task]:
    """MLPs in bytes, as plans of ViT-B need them."""
    rows = [byte_row(FP8, 12608, form, device, 2.5) for form in BYTE_MLPS]
    return [*rows, byte_row(FP8, 50432, 224, device, 3.0), byte_row(INT8, 12608, 224, device, 2.5)]


PLANS = (
    ("joint params:60%", (64, 256, 1)),
    ("joint params:80%", (64, 256)),
    ("joint params:40%", (64, 256)),
    ("params:40%", (64, 256, 1)),
    ("ranks 128", (64, 256, 1)),
)
"""Plans of ViT-B and the batches that they run with."""
SECONDS = {64: 3.0, 256: 3.5, 1: 2.0}
"""What a model is planned to take at a batch."""
SOLVERS = (
    "torch.linalg.eigh, batched",
    "loop of torch.linalg.eigh",
    "cusolverDnXsyevBatched",
    "solve_batch fp64",
    "solve_batch fp32 with sweeps",
    "solve_batch by cuSOLVER",
    "leading_subspace fp32",
    "torch, of pairs",
    "triton.chain, of pairs",
    "cuda.fused, of pairs",
    "parts",
)


def _seconds(solver: str) -> float:
    """The first one makes the problems, 48 QR of 768 on the CPU."""
    return 5.0 if solver == SOLVERS[0] else 3.0 if "loop" in solver else 0.9


def _compiles(shapes: Sequence[Call], device: torch.device) -> list[Group]:
    """What torch.compile makes of rivals, in lanes of their own."""

    def task(call: Call, name: str) -> Task:
        return Task("compile", f"{name}, {call.label}", call.op, name, call.dtype, {"call": call, "rival": name}, 60, 7)

    # The rival of the other rows of bytes is the dense MLP of these.
    eights = [row.given["call"] for row in byte_rows(device) if "224" in row.call or "1920" in row.call]
    lanes = [[task(call, name) for call in shapes[index::4] for name in COMPILED_RIVALS] for index in range(4)]
    lanes += [[task(call, FP8_RIVAL) for call in eights[index::2]] for index in range(2)]
    return [Group(f"torch.compile {index}", lane) for index, lane in enumerate(lanes)]


def window_two(device: torch.device) -> Window:
    """Everything else, for what window 1 found right."""
    shapes = [mlp(M, r, device) for M in (12608, 50432) for r in (128, 224, 64, 256)]
    shapes += [mlp(M, r, device) for M in (197, 1576) for r in (128, 64)]
    checks = [
        Group(f"{op} {name}", [check(task.given["call"], name, 1.5) for task in grid(device) if task.op == op])
        for op, name in (
            (LINEAR, "triton.row_block"),
            (LINEAR, "triton.split"),
            (LINEAR, "cuda.cluster"),
            (MLP, "triton.row_block"),
            (MLP, "cuda.sm90"),
            (FP8, "triton.bytes"),
            (FP8, "cuda.bytes"),
            (FP8, "cuda.mlp"),
            (INT8, "triton.bytes"),
        )
    ]
    checks = [Group(g.name, g.tasks, BUILD if "cuda" in g.name else "") for g in checks]
    tuned = [mlp(M, r, device) for M in (12608, 50432) for r in (128, 224)]
    sweeps = [Task("sweep", c.label, MLP, "cuda.sm90", c.dtype, {"call": c}, 30.0, 3.0) for c in tuned]
    # Twice: what its tiles compile to is in Triton's cache when nothing else runs beside the measurement.
    tiles = [
        Task("autotune", label, MLP, "triton.row_block", "bfloat16", {"call": tuned[1], "keep": keep}, 60.0, seconds)
        for label, keep, seconds in ((f"{tuned[1].label}, compiled", False, 25.0), (tuned[1].label, True, 6.0))
    ]
    sweeps.append(tiles[1])
    models = [
        Task("model", f"{plan} batch {batch} graph", "", "", "", {"plan": plan, "batch": batch}, 60, SECONDS[batch])
        for plan, batches in PLANS
        for batch in batches
    ]
    eager = {"batch": 64, "mode": "eager", "names": NAMES[1:]}
    first = [
        Task("model", f"{plan}, for the compiler's cache", given={"plan": plan, **eager}, deadline=60, seconds=15)
        for plan, _ in PLANS
    ]
    last = PLANS[-1][0]
    compiled = {"plan": last, "batch": 64, "mode": "compiled", "names": ("dense", "fused")}
    cell, warm = (
        Task("model", f"{last} batch 64 {label}", given=compiled, deadline=60, seconds=seconds)
        for label, seconds in (("compiled", 12), ("compiled, for the compiler's cache", 50))
    )
    solvers = [
        Task("solve", name, "batched_solve", name, "float64", {"solver": name}, 30.0, _seconds(name))
        for name in SOLVERS
    ]
    apart = [Group("compiled model", [warm]), Group("tiles", tiles[:1]), *(Group(task.call, [task]) for task in first)]
    ahead = [*apart, *_compiles(shapes, device), *checks]
    ahead = [build(), *sorted(ahead, key=lambda group: -group.seconds)]
    return Window(
        "window 2",
        [
            Phase("ceilings", 6, lambda found: [_ceilings()]),
            Phase("precompile", 60, lambda found: ahead, lanes=10),
            Phase("MLPs", 45, lambda found: [Group("MLPs", [mlp_row(call, 3.5, compiled=True) for call in shapes])]),
            Phase("grid", 47, lambda found: [Group("grid", grid(device))]),
            Phase("tuning", 20, lambda found: [Group("tuning", sweeps)]),
            Phase("models", 54, lambda found: [Group("models", [*models, cell])]),
            Phase("solve", 18, lambda found: [Group("solve", solvers)]),
            Phase("choice", 4, lambda found: [Group("choice", [Task("choice", "of every row", seconds=2)])]),
        ],
    )  # fmt: skip
