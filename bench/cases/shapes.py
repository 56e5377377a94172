"""Shapes that kernels meet in real models: `python -m bench.cases.shapes [--batch 64]` prints them with their floors.

Geometries are those of timm's models of these names (`tests/bench/test_shapes.py` compares); ranks are the ones that
plans keep, up to the break-even rank, from which on the dense layer has fewer FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCHES = (1, 8, 64, 256)
RANKS = (16, 32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Geometry:
    """One kind of block: timm's name, width, hidden width, tokens an image, and whether the MLP is gated (SwiGLU)."""

    model: str
    width: int
    hidden: int
    tokens: int
    gated: bool = False
    stage: int | None = None

    @property
    def name(self) -> str:
        return self.model if self.stage is None else f"{self.model}.{self.stage}"


GEOMETRIES = (
    Geometry("vit_tiny_patch16_224", 192, 768, 197),
    Geometry("vit_small_patch16_224", 384, 1536, 197),
    Geometry("vit_base_patch16_224", 768, 3072, 197),
    Geometry("vit_large_patch16_224", 1024, 4096, 197),
    Geometry("vit_huge_patch14_224", 1280, 5120, 257),
    Geometry("vit_giant_patch14_224", 1408, 6144, 257),
    *(Geometry("swin_tiny_patch4_window7_224", 96 << i, 384 << i, 3136 >> (2 * i), stage=i) for i in range(4)),
    Geometry("vit_base_patch14_dinov2", 768, 3072, 1370),
    Geometry("vit_giant_patch14_dinov2", 1536, 4096, 1370, gated=True),
)


@dataclass(frozen=True)
class Linear:
    """A linear of a model: timm's name, the layer, in_features K, out_features N, tokens an image."""

    model: str
    layer: str
    K: int
    N: int
    tokens: int

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks below break-even, `N K / (N + K)`."""
        return tuple(r for r in RANKS if r < self.K * self.N / (self.K + self.N))


def linears() -> Iterator[Linear]:
    """The four linears of a block of every geometry."""
    for g in GEOMETRIES:
        first = 2 * g.hidden if g.gated else g.hidden
        shapes = {"qkv": (g.width, 3 * g.width), "proj": (g.width, g.width), "fc1": (g.width, first)}
        for layer, (K, N) in {**shapes, "fc2": (g.hidden, g.width)}.items():
            yield Linear(g.name, layer, K, N, g.tokens)


def geometry(model: str) -> Geometry:
    """The geometry of a name. Raises KeyError for one that is not there."""
    return {g.name: g for g in GEOMETRIES}[model]


def main() -> None:
    import argparse

    import torch

    from vitlr.ops.dispatch.ceilings import H200
    from vitlr.ops.layers.lowrank_linear import Key, roofline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="images")
    batch = parser.parse_args().batch
    print(f"{H200.name}, bf16, batch {batch}: floor of a dense layer and of one fused low-rank pass, in µs")
    for linear in linears():
        M = batch * linear.tokens
        flops, size = 2 * M * linear.K * linear.N, 2 * (M * (linear.K + linear.N) + linear.K * linear.N)
        dense = H200.microseconds(flops, size, torch.bfloat16)
        floors = [
            f"r={r} {roofline(Key(M, linear.K, linear.N, r, dtype=torch.bfloat16), H200).floor_us:.1f}"
            for r in linear.ranks
        ]
        shape = f"{linear.K}x{linear.N}"
        print(f"{linear.model:30} {linear.layer:5} {shape:>10}  M={M:<7} dense {dense:8.1f}   {'  '.join(floors)}")


if __name__ == "__main__":
    main()
