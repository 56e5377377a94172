"""What vitlr._cuda launches, refuses and reports, seen through a CUDA runtime that is none (fake_cuda_runtime.cpp)."""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "csrc" / "nvcc.py").is_file():
    pytest.skip("not run from a source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / "csrc"))
nvcc = importlib.import_module("nvcc")
pytest.importorskip("pybind11", reason="the bindings are built with pybind11")

STREAM = 7
NO_KERNEL_IMAGE, ILLEGAL_ADDRESS, INVALID_VALUE = 209, 700, 1  # of driver_types.h


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared: int
    stream: int
    device: int


class Fake(NamedTuple):
    """The module, and the runtime that it was linked with."""

    module: Any
    runtime: Any

    def launches(self) -> list[Launch]:
        lines = [line.split()[1:] for line in self.log().splitlines() if line.startswith("launch")]
        return [Launch(kernel, *map(int, numbers)) for kernel, *numbers in lines]

    def log(self) -> str:
        return self.runtime.fake_log().decode()


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Fake:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    try:
        tool = nvcc.find()
        archs = nvcc.architectures("8.0+PTX;9.0a")
        objects = [made.object for made in nvcc.compile_all(nvcc.sources(archs), archs)]
    except nvcc.BuildError as reason:
        pytest.skip(str(reason))
    home = subprocess.run([tool, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, cwd=ROOT).stderr
    includes = [word.strip('"') for line in home.splitlines() if "INCLUDES=" in line for word in line.split()[1:]]
    includes = [word.removeprefix("INCLUDES=").strip('"') for word in includes if "-I" in word]
    target = tmp_path_factory.mktemp("fake") / "_cuda.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic"]
    command = [compiler, *flags, *includes, "tests/csrc/fake_cuda_runtime.cpp", *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    spec = importlib.util.spec_from_file_location("_cuda", target, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    runtime = ctypes.CDLL(str(target))
    runtime.fake_log.restype = ctypes.c_char_p
    return Fake(module, runtime)


@pytest.fixture
def fake(linked) -> Fake:
    linked.runtime.fake_reset(90)
    return linked


def at(offset: int, device: int = 1) -> int:
    """An address on a device of the fake runtime."""
    return 1 << 44 | device << 40 | offset << 24


def matrix(offset: int, n: int, device: int = 1) -> tuple[int, int, int, int]:
    return at(offset, device), n * n, n, 1


def chain(fake, X=None, Y=None, out=None, n=768, batch=48, flags=(False,) * 4, M=None):
    matrices = [given or matrix(i, n) for i, given in enumerate((X, Y, out), 1)]
    fake.module.weighted_chain(*matrices, batch, M or n, n, n, *flags, 1, STREAM)


def cholesky(fake, n=200, batch=3, **given):
    pointers = {"F": matrix(1, n), "L": matrix(2, n), "inverse": at(3), "shift": at(4), "info": at(5), **given}
    fake.module.cholesky(*pointers.values(), batch, n, 1, STREAM)


@pytest.mark.parametrize(
    ("n", "batch", "symmetric", "blocks", "threads", "shared"),
    [
        (768, 48, False, 48 * 36, 256, 120 * 1024),
        (768, 48, True, 48 * 21, 256, 120 * 1024),
        (65, 2, False, 2 * 4, 128, 60 * 1024),
        (65, 2, True, 2 * 3, 128, 60 * 1024),
    ],
)
def test_products(fake, n, batch, symmetric, blocks, threads, shared):
    chain(fake, n=n, batch=batch, flags=(symmetric, False, False, False))
    (launch,) = fake.launches()
    assert "product_kernel" in launch.kernel and launch[1:] == (blocks, threads, shared, STREAM, 1)
    assert fake.runtime.fake_current() == 0, "the caller's device is the current one again"


@pytest.mark.parametrize(("capability", "threads"), [(80, 256), (86, 128), (89, 128), (90, 256)])
def test_tiles_fit_the_shared_memory(fake, capability, threads):
    fake.runtime.fake_reset(capability)
    chain(fake)
    assert [launch.threads for launch in fake.launches()] == [threads]


def test_the_factorisation_goes_from_panel_to_panel(fake):
    cholesky(fake, n=200, batch=3)
    launches = fake.launches()
    names = ["factor" if "factor_kernel" in launch.kernel else "below" for launch in launches]
    assert names == ["factor", "below", "factor", "below", "factor", "below", "factor"]
    assert [launch.blocks for launch in launches] == [3, 9, 3, 6, 3, 3, 3]
    assert {launch[2:] for launch in launches} == {(128, 68 * 1024, STREAM, 1)}


def test_substitution_goes_from_the_last_panel_up(fake):
    n = 200
    fake.module.back_substitution(matrix(1, n), matrix(2, n), matrix(3, n), at(4), 3, n, 70, 1, STREAM)
    assert [launch.blocks for launch in fake.launches()] == [3 * 2] * 4


def test_nothing_is_launched_for_nothing(fake):
    chain(fake, batch=0)
    cholesky(fake, batch=0)
    cholesky(fake, n=0)
    fake.module.back_substitution(matrix(1, 8), matrix(2, 8), matrix(3, 8), at(4), 3, 8, 0, 1, STREAM)
    assert fake.launches() == []


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (chain, {"X": (0, 1, 1, 1)}, "X is a null pointer"),
        (chain, {"Y": (at(2) + 4, 1, 1, 1)}, "Y is not aligned to 8 bytes"),
        (chain, {"out": matrix(3, 8, device=0)}, "out does not lie on CUDA device 1"),
        (chain, {"X": (4096, 1, 1, 1)}, "X does not lie on CUDA device 1"),
        (chain, {"M": 5, "flags": (True, False, False, False)}, "as many rows as columns"),
        (chain, {"batch": 2**31}, "more tiles than a launch has blocks; solve smaller batches"),
        (cholesky, {"info": at(5) + 2}, "info is not aligned to 4 bytes"),
        (cholesky, {"shift": 0}, "shift is a null pointer"),
        (cholesky, {"inverse": at(3, device=0)}, "inverse does not lie on CUDA device 1"),
        (cholesky, {"batch": 2**31}, "the batch is too large"),
    ],
)
def test_what_is_wrong_is_refused_before_a_launch(fake, call, given, message):
    with pytest.raises(ValueError, match=message):
        call(fake, **given)
    assert fake.launches() == [] and fake.runtime.fake_current() == 0


def test_an_older_gpu_is_refused(fake):
    fake.runtime.fake_reset(75)
    for call in (chain, cholesky):
        with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or later, device 1 has 7\.5"):
            call(fake)
    assert fake.launches() == []


@pytest.mark.parametrize("call", [chain, cholesky])
@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("launch", NO_KERNEL_IMAGE, "cudaErrorNoKernelImageForDevice .*rebuild with TORCH_CUDA_ARCH_LIST"),
        ("launch", ILLEGAL_ADDRESS, "an earlier kernel of this process may be the cause.*compute-sanitizer"),
        ("cudaFuncSetAttribute", INVALID_VALUE, "shared memory: .*VITLR_BACKEND=torch does without"),
        ("cudaPointerGetAttributes", ILLEGAL_ADDRESS, "cudaPointerGetAttributes: .*restart it"),
        ("cudaDeviceGetAttribute", INVALID_VALUE, "cudaDeviceGetAttribute: "),
        ("cudaGetDevice", INVALID_VALUE, "cudaGetDevice: "),
        ("cudaSetDevice", INVALID_VALUE, "cudaSetDevice: "),
    ],
)
def test_every_status_becomes_an_error_that_says_what_to_do(fake, call, where, status, message):
    fake.runtime.fake_fail(where.encode(), status)
    with pytest.raises(RuntimeError, match=message):
        call(fake)
    assert "cleared" in fake.log(), "else the next call would report it once more"
    assert len(fake.launches()) <= 1, "nothing follows a launch that failed"


def lowrank_mlp(fake, M=12608, K=768, D=3072, N=768, r1=128, r2=128, act=1, residual=True, **given):
    matrices = {"x": (at(1), K), "B1": (at(2), K), "A1": (at(3), r1), "B2": (at(4), D), "A2": (at(5), r2)}
    matrices["residual"] = (at(6), N) if residual else None
    matrices |= {name: given.pop(name) for name in list(given) if name in matrices}
    plan = given.pop("plan", None)
    vectors = {"b1": at(7), "b2": at(8), "y": at(9), **given}
    fake.module.lowrank_sm90(*matrices.values(), *vectors.values(), M, K, D, N, r1, r2, act, False, plan, 1, STREAM)


def lowrank_linear(fake, M=197, K=3072, N=768, r=128, **given):
    lowrank_mlp(fake, M, K, 0, N, r, r, 0, **{"A1": None, "B2": None, "b1": 0, **given})


@pytest.mark.parametrize(
    ("call", "sizes", "blocks", "threads", "kernel"),
    [
        (lowrank_mlp, {}, 132, 512, "TileILi128ELi3EEELb1"),  # 66 clusters of two
        (lowrank_mlp, {"M": 50432, "residual": False}, 132, 512, "TileILi128ELi3EEELb1"),
        (lowrank_mlp, {"r1": 200, "r2": 256}, 99, 384, "TileILi256ELi2EEELb1"),
        (lowrank_mlp, {"M": 197, "r1": 64, "r2": 8}, 32, 256, "TileILi64ELi1EEELb1"),
        (lowrank_linear, {}, 32, 256, "TileILi128ELi1EEELb0"),
        (lowrank_linear, {"M": 1, "K": 8, "N": 8, "r": 8}, 1, 256, "TileILi64ELi1EEELb0"),
        (lowrank_mlp, {"plan": (128, 1, 8, 16, 1)}, 128, 256, "TileILi128ELi1EEELb1"),  # as given
        (lowrank_mlp, {"plan": (256, 2, 1, 7, 1)}, 7, 384, "TileILi256ELi2EEELb1"),
        (lowrank_linear, {"plan": (128, 1, 2, 5, 3)}, 10, 256, "TileILi128ELi1EEELb0"),
    ],
)
def test_lowrank_kernels(fake, call, sizes, blocks, threads, kernel):
    call(fake, **sizes)
    (launch,) = fake.launches()
    assert kernel in launch.kernel and launch[1:3] == (blocks, threads) and launch[4:] == (STREAM, 1)
    assert launch.shared <= 227 * 1024 and fake.runtime.fake_current() == 0
    boxes = [tuple(map(int, line.split()[1:])) for line in fake.log().splitlines() if line.startswith("map")]
    assert len(boxes) == 7 and all(rows <= 256 and columns in (32, 64) for _, _, rows, columns in boxes)


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (lowrank_mlp, {"x": (0, 768)}, "x is a null pointer"),
        (lowrank_mlp, {"A1": (at(3) + 8, 128)}, "A1 is not aligned to 16 bytes"),
        (lowrank_mlp, {"B2": (at(4), 3076)}, "B2 has rows 3076 elements apart, expected a multiple of 8"),
        (lowrank_mlp, {"A2": (at(5, device=0), 128)}, "A2 does not lie on CUDA device 1"),
        (lowrank_mlp, {"b1": at(7) + 2}, "b1 is not aligned to 4 bytes"),
        (lowrank_mlp, {"y": at(9) + 8}, "y is not aligned to 16 bytes"),
        (lowrank_mlp, {"A1": None}, "A1 and B2 come with D"),
        (lowrank_mlp, {"D": 3076}, "B2 has rows 3076|multiples of 8"),
        (lowrank_mlp, {"M": 0}, "rows 1 to"),
        (lowrank_mlp, {"act": 6}, "no such activation"),
        (lowrank_mlp, {"r1": 264}, "ranks 264 and 128 are beyond 256"),
        (lowrank_linear, {"r": 264}, "ranks 264 and 264 are beyond 256"),
        (lowrank_mlp, {"plan": (128, 3, 1, 1)}, "a plan is .R, warpgroups, ranks, clusters, groups"),
        (lowrank_mlp, {"plan": (128, 2, 1, 1, 1)}, "no tile of rank 128 with 2 warpgroups is compiled"),
        (lowrank_linear, {"plan": (128, 3, 1, 1, 1)}, "no tile of rank 128 with 3 warpgroups is compiled"),
        (lowrank_mlp, {"plan": (64, 3, 1, 1, 1)}, "a tile of rank 64 does not hold ranks up to 128"),
        (lowrank_mlp, {"plan": (128, 3, 3, 1, 1)}, "3 CTAs a cluster, expected 1, 2, 4 or 8"),
        (lowrank_mlp, {"plan": (128, 3, 16, 1, 1)}, "16 CTAs a cluster, expected 1, 2, 4 or 8"),
        (lowrank_mlp, {"D": 192, "plan": (128, 3, 4, 1, 1)}, "4 CTAs a cluster share 2 steps"),
        (lowrank_linear, {"K": 64, "plan": (128, 1, 2, 1, 1)}, "2 CTAs a cluster share 1 steps"),
        (lowrank_linear, {"plan": (128, 1, 2, 1, 4)}, "8 CTAs share 6 tiles of output"),
        (lowrank_mlp, {"plan": (128, 3, 1, 0, 1)}, "0 clusters, expected 1 to"),
        (lowrank_mlp, {"plan": (128, 3, 1, 1, 2)}, "2 groups, expected 1, as of every MLP"),
    ],
)
def test_lowrank_kernels_refuse_before_a_launch(fake, call, given, message):
    with pytest.raises(ValueError, match=message):
        call(fake, **given)
    assert fake.launches() == [] and fake.runtime.fake_current() == 0


def fp8_linear(fake, M=12608, K=224, N=3072, act=1, **given):
    matrices = {"q": at(1), "W": at(2), "y": at(3)}
    vectors = {name: at(4 + i) for i, name in enumerate(("rows_scale", "squares", "scale", "bias", "reach", "s", "y2"))}
    where = {
        **matrices,
        **vectors,
        **{name: given.pop(name) for name in list(given) if name in {**matrices, **vectors}},
    }
    ctas = given.pop("ctas", 0)
    addresses = list(where.values())
    fake.module.fp8_linear_sm90(*addresses[:3], M, K, N, act, 2, *addresses[3:], ctas, 1, STREAM)


@pytest.mark.parametrize(
    ("sizes", "blocks", "kernel"),
    [
        ({}, 132, "TileILi3ELi3EE"),  # a rank of 224: three steps of the second panel
        ({"K": 384}, 132, "TileILi3ELi4EE"),
        ({"K": 768}, 132, "TileILi6ELi4EE"),
        ({"K": 400, "N": 1024, "M": 1}, 8, "TileILi6ELi4EE"),
        ({"K": 16, "N": 16, "M": 193, "bias": 0}, 2, "TileILi3ELi1EE"),
        ({"K": 192, "ctas": 7}, 7, "TileILi3ELi2EE"),
    ],
)
def test_the_kernel_of_8_bit_floats(fake, sizes, blocks, kernel):
    fp8_linear(fake, **sizes)
    (launch,) = fake.launches()
    assert kernel in launch.kernel and launch[1:3] == (blocks, 512) and launch[4:] == (STREAM, 1)
    assert launch.shared <= 227 * 1024 and fake.runtime.fake_current() == 0
    boxes = [tuple(map(int, line.split()[3:])) for line in fake.log().splitlines() if line.startswith("map")]
    assert boxes == [(192, 64), (128, 64), (64, 64)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": at(1) + 8}, "q is not aligned to 16 bytes"),
        ({"W": at(2, device=0)}, "W does not lie on CUDA device 1"),
        ({"scale": at(6) + 4}, "scale is not aligned to 8 bytes"),
        ({"s": 0}, "y's scale is a null pointer"),
        ({"act": 6}, "no such activation"),
        ({"K": 100}, "K = 100, expected a multiple of 16 up to 768"),
        ({"K": 784}, "K = 784, expected a multiple of 16 up to 768"),
        ({"N": 24}, "N = 24, expected a multiple of 16"),
        ({"M": 0}, "M = 0, expected 1 to"),
    ],
)
def test_the_kernel_of_8_bit_floats_refuses_before_a_launch(fake, given, message):
    with pytest.raises(ValueError, match=message):
        fp8_linear(fake, **given)
    assert fake.launches() == [] and fake.runtime.fake_current() == 0


MLP_POINTERS = (
    *("rows_scale", "squares", "reach", "scale1", "bias1", "scale2", "bias2", "scale3", "bias3"),
    *("residual", "sums", "flags"),
)


def fp8_mlp(fake, M=12608, r1=224, D=3072, r2=224, N=768, act=1, ctas=0, **given):
    names = ("q", "W1", "W2", "W3", "y", *MLP_POINTERS)
    where = {name: given.get(name, at(1 + i)) for i, name in enumerate(names)}
    addresses = list(where.values())
    fake.module.fp8_mlp_sm90(*addresses[:5], M, r1, D, r2, N, act, False, 2, *addresses[5:], ctas, 1, STREAM)


@pytest.mark.parametrize(
    ("sizes", "blocks", "kernel"),
    [
        ({}, 132, "TileILi224EE"),
        ({"r1": 192, "r2": 16}, 132, "TileILi192EE"),
        ({"r2": 256, "residual": 0, "bias2": 0}, 132, "TileILi256EE"),
        ({"M": 197}, 12, "TileILi224EE"),  # two row blocks of 24 slices, four for each
        ({"ctas": 7}, 7, "TileILi224EE"),
    ],
)
def test_the_mlp_of_8_bit_floats(fake, sizes, blocks, kernel):
    fp8_mlp(fake, **sizes)
    (launch,) = fake.launches()
    assert kernel in launch.kernel and launch[1:3] == (blocks, 384) and launch[4:] == (STREAM, 1)
    assert launch.shared <= 227 * 1024 and fake.runtime.fake_current() == 0
    shape = {"M": 12608, "r1": 224, "D": 3072, "r2": 224, "N": 768, "ctas": 0, **sizes}
    room = fake.module.fp8_mlp_sm90_room(*(shape[name] for name in ("M", "r1", "D", "r2", "N", "ctas")), 1)
    assert room == (blocks, 128 * int(kernel[7:10]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"W2": at(3) + 8}, "W2 is not aligned to 16 bytes"),
        ({"W3": at(4, device=0)}, "W3 does not lie on CUDA device 1"),
        ({"scale3": at(13) + 8}, "scale3 is not aligned to 16 bytes"),
        ({"sums": 0}, "the room for sums is a null pointer"),
        ({"act": 6}, "no such activation"),
        ({"r1": 100}, "r1 = 100, expected a multiple of 16"),
        ({"D": 3080}, "D = 3080, expected a multiple of 16"),
        ({"r2": 272}, "ranks 224 and 272, expected at most 256"),
        ({"M": 0}, "M = 0, expected 1 to"),
    ],
)
def test_the_mlp_of_8_bit_floats_refuses_before_a_launch(fake, given, message):
    with pytest.raises(ValueError, match=message):
        fp8_mlp(fake, **given)
    assert fake.launches() == [] and fake.runtime.fake_current() == 0


def test_every_plan_that_the_gate_forces_is_launched(fake):
    if not (ROOT / "bench").is_dir():
        pytest.skip("bench/ is not beside the tests")
    sys.path.insert(0, str(ROOT))
    gate, tuning = (importlib.import_module(f"bench.gate.{name}") for name in ("checks", "tuning"))
    plans = [(plan, *shape) for plan, shape in (*gate.TILES, *gate.CLUSTERS, *gate.ITEMS)]
    plans += [(plan, 12608, 768, 3072, 768, r, r) for r in gate.RANKS for plan in tuning.plans(12608, r)]
    for plan, *shape in plans:
        lowrank_mlp(fake, *shape, plan=plan)
    for plan, shape in gate.LINEARS:
        lowrank_linear(fake, *shape, plan=plan)
    assert len(fake.launches()) == len(plans) + len(gate.LINEARS)
    assert any(plan[2] > 1 for plan, *_ in plans) and {plan[:2] for plan, *_ in plans} == set(tuning.TILES)


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_lowrank_kernels_run_on_hopper_alone(fake, capability):
    fake.runtime.fake_reset(capability)
    for call in (lowrank_mlp, fp8_linear):
        with pytest.raises(ValueError, match=r"needs compute capability 9\.0, device 1 has"):
            call(fake)


@pytest.mark.parametrize(
    "where", ["launch", "cudaFuncSetAttribute", "cuTensorMapEncodeTiled", "cudaDeviceGetAttribute"]
)
def test_every_status_of_the_lowrank_kernels_becomes_an_error(fake, where):
    fake.runtime.fake_fail(where.encode(), INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"VITLR_BACKEND=torch does without"):
        lowrank_linear(fake)
