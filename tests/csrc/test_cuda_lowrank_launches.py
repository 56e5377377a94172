"""What the low-rank kernels for Hopper launch and refuse, seen through the CUDA runtime that is none."""

from __future__ import annotations

import pytest
from test_cuda_launches import INVALID_VALUE, STREAM, at, fake, linked  # noqa: F401 (fixtures)


def mlp(fake, M=12608, K=768, D=3072, N=768, r1=128, r2=128, act=1, residual=True, **given):  # noqa: F811
    matrices = {"x": (at(1), K), "B1": (at(2), K), "A1": (at(3), r1), "B2": (at(4), D), "A2": (at(5), r2)}
    matrices["residual"] = (at(6), N) if residual else None
    matrices |= {name: given.pop(name) for name in list(given) if name in matrices}
    vectors = {"b1": at(7), "b2": at(8), "y": at(9), **given}
    fake.module.lowrank_sm90(*matrices.values(), *vectors.values(), M, K, D, N, r1, r2, act, False, 1, STREAM)


def linear(fake, M=197, K=3072, N=768, r=128, **given):  # noqa: F811
    mlp(fake, M, K, 0, N, r, r, 0, **{"A1": None, "B2": None, "b1": 0, **given})


@pytest.mark.parametrize(
    ("call", "sizes", "blocks", "threads", "kernel"),
    [
        (mlp, {}, 132, 512, "TileILi128ELi3EEELb1"),  # 66 clusters of two
        (mlp, {"M": 50432, "residual": False}, 132, 512, "TileILi128ELi3EEELb1"),
        (mlp, {"r1": 200, "r2": 256}, 99, 384, "TileILi256ELi2EEELb1"),
        (mlp, {"M": 197, "r1": 64, "r2": 8}, 32, 256, "TileILi64ELi1EEELb1"),
        (linear, {}, 32, 256, "TileILi128ELi1EEELb0"),
        (linear, {"M": 1, "K": 8, "N": 8, "r": 8}, 1, 256, "TileILi64ELi1EEELb0"),
    ],
)
def test_launches(fake, call, sizes, blocks, threads, kernel):  # noqa: F811
    call(fake, **sizes)
    (launch,) = fake.launches()
    assert kernel in launch.kernel and launch[1:3] == (blocks, threads) and launch[4:] == (STREAM, 1)
    assert launch.shared <= 227 * 1024 and fake.runtime.fake_current() == 0
    boxes = [tuple(map(int, line.split()[1:])) for line in fake.log().splitlines() if line.startswith("map")]
    assert len(boxes) == 7 and all(rows <= 256 and columns in (32, 64) for _, _, rows, columns in boxes)


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (mlp, {"x": (0, 768)}, "x is a null pointer"),
        (mlp, {"A1": (at(3) + 8, 128)}, "A1 is not aligned to 16 bytes"),
        (mlp, {"B2": (at(4), 3076)}, "B2 has rows 3076 elements apart, expected a multiple of 8"),
        (mlp, {"A2": (at(5, device=0), 128)}, "A2 does not lie on CUDA device 1"),
        (mlp, {"b1": at(7) + 2}, "b1 is not aligned to 4 bytes"),
        (mlp, {"y": at(9) + 8}, "y is not aligned to 16 bytes"),
        (mlp, {"A1": None}, "A1 and B2 come with D"),
        (mlp, {"D": 3076}, "B2 has rows 3076|multiples of 8"),
        (mlp, {"M": 0}, "rows 1 to"),
        (mlp, {"act": 6}, "no such activation"),
        (mlp, {"r1": 264}, "ranks 264 and 128 are beyond 256"),
        (linear, {"r": 264}, "ranks 264 and 264 are beyond 256"),
    ],
)
def test_what_is_wrong_is_refused_before_a_launch(fake, call, given, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        call(fake, **given)
    assert fake.launches() == [] and fake.runtime.fake_current() == 0


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_other_gpus_are_refused(fake, capability):  # noqa: F811
    fake.runtime.fake_reset(capability)
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0, device 1 has"):
        mlp(fake)


@pytest.mark.parametrize(
    "where", ["launch", "cudaFuncSetAttribute", "cuTensorMapEncodeTiled", "cudaDeviceGetAttribute"]
)
def test_every_status_becomes_an_error_that_says_what_to_do(fake, where):  # noqa: F811
    fake.runtime.fake_fail(where.encode(), INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"VITLR_BACKEND=torch does without"):
        linear(fake)
