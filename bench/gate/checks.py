"""What window 1 asks of every candidate: which calls it has to be right on, simplest first.

The CUDA kernels begin with a launch that is captured and replayed, then forced plans, one warpgroup first; Triton's
begin with ViT-B's shapes in bf16, ragged ones and other dtypes come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.cases import byte_calls, calls, correctness
from bench.cases.calls import Call
from bench.cases.shapes import geometry
from bench.gate.tasks import Group, Task

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANKS = (64, 128, 224, 256)
MLP = "lowrank_mlp"
LINEAR = "lowrank_linear"
RESIDUAL = "lowrank_residual_linear"
FP8, INT8 = "fp8_chain", "int8_chain"
HIDDEN = ("gelu", "none", "none")
COMPILED = 2.5  # planned seconds of a check for which Triton compiles
LAUNCHED = 0.7  # and of one that only runs
BUILD = "build csrc/cuda"

# Forced plans of cuda.sm90, simplest first: (R, warpgroups, CTAs a cluster, clusters, groups), (M, K, D, N, r1, r2).
TILES = (
    ((64, 1, 1, 1, 1), (64, 64, 128, 128, 64, 64)),
    ((128, 1, 1, 4, 1), (200, 72, 296, 136, 104, 128)),
    ((192, 1, 1, 4, 1), (200, 72, 296, 136, 192, 136)),
    ((64, 3, 1, 2, 1), (300, 72, 296, 136, 64, 40)),
    ((128, 3, 1, 2, 1), (300, 72, 296, 136, 128, 96)),
    ((192, 2, 1, 3, 1), (300, 72, 296, 136, 192, 136)),
    ((256, 2, 1, 3, 1), (300, 72, 296, 136, 256, 200)),
)
CLUSTERS = (
    ((64, 1, 2, 4, 1), (200, 72, 296, 136, 64, 64)),
    ((128, 1, 8, 2, 1), (130, 72, 1032, 200, 128, 128)),
    ((64, 3, 8, 2, 1), (300, 72, 1032, 1096, 64, 40)),
    ((128, 3, 2, 2, 1), (300, 72, 552, 136, 128, 96)),
    ((192, 2, 4, 3, 1), (300, 72, 552, 136, 192, 192)),
    ((256, 2, 2, 3, 1), (300, 72, 552, 264, 208, 256)),
)
ITEMS = (
    ((128, 3, 1, 3, 1), (2000, 136, 552, 264, 128, 128)),
    ((128, 3, 2, 2, 1), (2000, 136, 552, 264, 128, 128)),
    ((256, 2, 2, 2, 1), (1000, 136, 552, 264, 256, 256)),
)
LINEARS = (  # the same of cuda.cluster: (M, K, N, r)
    ((64, 1, 1, 1, 1), (64, 128, 128, 64)),
    ((128, 1, 2, 2, 1), (200, 136, 264, 128)),
    ((128, 1, 8, 2, 1), (200, 1032, 264, 104)),
    ((256, 1, 4, 2, 2), (130, 520, 1096, 256)),
    ((128, 1, 2, 3, 1), (1000, 136, 264, 128)),
)


def check(
    call: Call, candidate: str, seconds: float = COMPILED, plan: tuple | None = None, kind: str = "check"
) -> Task:
    """Is a candidate right on a call?"""
    label = call.label + (f" plan {plan}" if plan else "")
    given = {"call": call, "plan": plan}
    deadline = 60.0 if candidate.startswith("triton") else 20.0
    return Task(kind, label, call.op, candidate, call.dtype, given, deadline, seconds)


def mlp(M: int, r: int, device: torch.device, dtype: torch.dtype = BF16) -> Call:
    """The MLP of ViT-B with both ranks r."""
    return calls.mlp(M, 768, 3072, 768, r, r, dtype, device)


def _with_plan(table: Sequence[tuple], dtype: torch.dtype, device: torch.device) -> list[Task]:
    name = "cuda.sm90" if len(table[0][1]) == 6 else "cuda.cluster"
    make = calls.mlp if name == "cuda.sm90" else calls.linear
    return [check(make(*shape, dtype, device), name, LAUNCHED, plan) for plan, shape in table]


def cuda_groups(device: torch.device) -> list[Group]:
    """The CUDA kernels, one lane after the other: capture and replay first, whole problems last."""
    small = calls.mlp(64, 64, 128, 128, 64, 64, BF16, device)
    line = calls.linear(64, 128, 128, 64, BF16, device)
    chains = [calls.chain(2, m, k, torch.float64, device) for m, k in ((1, 5), (70, 133), (300, 64))]
    parts = ("cholesky", "congruence", "projectors", "XsyevBatched", "capture cholesky", "capture projectors")
    several = [mlp(20005, 128, device), *(mlp(50437, r, device) for r in (64, 128, 192, 256))]
    whole = [mlp(M, r, device) for M in (197, 1576, 12608, 50432) for r in RANKS]
    linears = [*_linears(device, (197, 12608))]
    eights = [byte_mlp(FP8, M, form, device) for M in (197, 12608) for form in (224, 384, "dense")]
    return [
        Group(
            "cuda chain",
            [
                check(chains[0], "cuda.tensor_cores", LAUNCHED, kind="capture"),
                *(check(call, "cuda.tensor_cores", LAUNCHED) for call in chains),
                check(calls.chain(48, 768, 768, torch.float64, device), "cuda.tensor_cores", 1.5),
            ],
            BUILD,
        ),
        Group(
            "cuda solve",
            [
                Task("part", f"{part} n={n}", "batched_solve", "cuda.fused", "float64", {"part": part, "n": n})
                for n in (5, 200, 768)
                for part in parts
            ],
            BUILD,
        ),
        Group(
            "cuda bytes",
            [
                check(
                    byte_calls.fp8_chain(70, (64, 144, 48), ("gelu", "none"), BF16, device),
                    "cuda.bytes",
                    kind="capture",
                ),
                check(byte_calls.fp8_chain(200, (96, 400, 48), ("silu", "none"), FP16, device), "cuda.bytes"),
                *(check(call, "cuda.bytes") for call in eights),
                check(byte_mlp(FP8, 50437, 224, device), "cuda.bytes", LAUNCHED),
            ],
            BUILD,
        ),
        Group(
            "cuda mlp",
            [
                check(byte_calls.fp8_chain(64, (64, 128, 64, 64), HIDDEN, BF16, device), "cuda.mlp", kind="capture"),
                check(byte_calls.fp8_chain(300, (96, 400, 48, 80), HIDDEN, FP16, device), "cuda.mlp"),
                *(check(byte_mlp(FP8, M, r, device), "cuda.mlp") for r in (192, 224, 256) for M in (197, 12608)),
                check(byte_mlp(FP8, 50437, 224, device), "cuda.mlp", LAUNCHED),
            ],
            BUILD,
        ),
        Group(
            "cuda cluster",
            [
                check(line, "cuda.cluster", LAUNCHED, kind="capture"),
                *_with_plan(LINEARS, BF16, device),
                *(check(call, "cuda.cluster", LAUNCHED) for call in linears),
                *_with_plan(LINEARS, FP16, device),
            ],
            BUILD,
        ),
        Group(
            "cuda sm90",
            [
                check(small, "cuda.sm90", LAUNCHED, kind="capture"),
                *_with_plan(TILES, BF16, device),
                *_with_plan(CLUSTERS, BF16, device),
                *_with_plan(ITEMS, BF16, device),
                *(check(call, "cuda.sm90", LAUNCHED) for call in (*whole, *several)),
                *(
                    check(call, "cuda.sm90", LAUNCHED)
                    for act in ("gelu_tanh", "silu", "sigmoid", "relu", "none")
                    for call in (calls.mlp(200, 72, 296, 136, 64, 64, BF16, device, act, residual=True),)
                ),
                *_with_plan((*TILES, *CLUSTERS, *ITEMS), FP16, device),
            ],
            BUILD,
        ),
    ]


def _linears(device: torch.device, rows: Sequence[int]) -> Iterator[Call]:
    for M in rows:
        for r in RANKS:
            yield calls.linear(M, 768, 3072, r, BF16, device, "gelu", residual=True)
            yield from (linear(layer, M, r, device) for layer in ("qkv", "proj", "fc1", "fc2"))


def linear(layer: str, M: int, r: int, device: torch.device) -> Call:
    """A linear of ViT-B."""
    K, N = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}[layer]
    return calls.linear(M, K, N, r, BF16, device)


def _ragged(device: torch.device, op: str) -> Iterator[Call]:
    """Ragged shapes of an op in bf16 and fp16, and one call in fp32: nobody runs more of that on a GPU."""
    for M in (1, 1000):
        for r in (64, 192, 256):
            if op == LINEAR:
                yield calls.linear(M, 768, 3072, r, BF16, device, "gelu", residual=True)
                yield calls.linear(M, 3072, 768, r, BF16, device)
            if op == MLP:
                yield mlp(M, r, device)
    for r1, r2 in ((96, 160), (None, 128), (128, None)) if op == MLP else ():
        yield calls.mlp(1000, 768, 3000, 768, r1, r2, BF16, device, residual=True)
    for r in (16, 64, 128) if op == RESIDUAL else ():
        yield from (calls.residual_linear(1000, 768, 2304, r, *form, BF16, device) for form in FORMS)
    for dtype in (BF16, FP16):
        yield from (call for call in correctness.small(device, dtype) if call.op == op)
    yield from [call for call in correctness.small(device, FP32) if call.op == op][:1]


def triton_groups(device: torch.device) -> list[Group]:
    """A group a candidate; bf16 and ViT-B first."""
    mlps = [mlp(M, r, device) for M in (12608, 50432, 197, 1576) for r in RANKS]
    linears = list(_linears(device, (12608, 197)))
    dense = [calls.mlp(1000, 768, 3072, 768, a, b, BF16, device) for a, b in ((128, None), (None, 128))]
    residuals = [
        calls.residual_linear(M, 768, 2304, 32, form, group, BF16, device)
        for M in (12608, 197)
        for form, group in FORMS
    ]
    glus = [glu(packed, device) for packed in (True, False)]
    chain = [calls.chain(48, 768, 768, FP32, device), calls.chain(2, 40, 72, FP32, device)]
    given = {
        (MLP, "triton.row_block"): [*mlps, mlp(50437, 128, device), *_ragged(device, MLP)],
        (MLP, "triton.split"): [*mlps[8:], *mlps[:4], *_ragged(device, MLP)],
        (MLP, "triton.two_steps"): [*dense, *_ragged(device, MLP)],
        (LINEAR, "triton.row_block"): [*linears, *_ragged(device, LINEAR)],
        (LINEAR, "triton.split"): [*reversed(linears), *_ragged(device, LINEAR)],
        ("lowrank_glu", "triton.row_block"): [*glus, *_ragged(device, "lowrank_glu")],
        (RESIDUAL, "triton.one_pass"): [*residuals, *_ragged(device, RESIDUAL)],
        (RESIDUAL, "triton.two_pass"): [*residuals, *_ragged(device, RESIDUAL)],
        ("weighted_gram_chain", "triton.chain"): chain,
        (FP8, "triton.bytes"): [
            *(byte_mlp(FP8, M, r, device) for M in (12608, 197) for r in BYTE_MLPS),
            *(byte_linear(FP8, 12608, N, device) for N in (2304, 768)),
            byte_mlp(FP8, 50437, 224, device),
            *_ragged(device, FP8),
        ],
        (INT8, "triton.bytes"): [
            *(byte_mlp(INT8, M, r, device) for M in (12608, 197) for r in BYTE_MLPS),
            byte_linear(INT8, 12608, 2304, device),
            *_ragged(device, INT8),
        ],
        ("int8_attention", "triton.bytes"): [
            byte_calls.int8_attention(8, 197, 768, 12, BF16, device),
            *_ragged(device, "int8_attention"),
        ],
    }
    # A kernel is compiled once for a dtype and tile: most of a candidate's calls find it there.
    groups = []
    for (op, candidate), every in given.items():
        tasks = [check(call, candidate, COMPILED if index < 8 else 1.0) for index, call in enumerate(every)]
        groups.append(Group(f"{op} {candidate}", tasks))
    return groups


BYTE_MLPS: tuple[int | str, ...] = (224, 384, "dense", "narrow")


def byte_mlp(op: str, M: int, form: int | str, device: torch.device) -> Call:
    """The MLP of ViT-B in bytes as it stands in a block: of that rank, dense, or narrowed to 1920 channels."""
    low = (form, 3072, form) if isinstance(form, int) else (1920 if form == "narrow" else 3072,)
    acts = ["none"] * (len(low) // 2) + ["gelu"] + ["none"] * (len(low) // 2 + 1)
    make = byte_calls.fp8_chain if op == FP8 else byte_calls.int8_chain
    return make(M, (768, *low, 768), acts, BF16, device, residual=True, norm=True)  # type: ignore[arg-type]


def byte_linear(op: str, M: int, N: int, device: torch.device) -> Call:
    """A linear from 768 channels to N in bytes, after its norm."""
    make = byte_calls.fp8_chain if op == FP8 else byte_calls.int8_chain
    return make(M, (768, N), ["none"], BF16, device, norm=True)


FORMS = (("int8", 64), ("int4", 64), ("fp8", 128), ("blockdiag", 64))


def glu(packed: bool, device: torch.device) -> Call:
    giant = geometry("vit_giant_patch14_dinov2")
    return calls.glu(8 * giant.tokens, giant.width, giant.hidden, giant.width, 128, 128, BF16, device, packed)
