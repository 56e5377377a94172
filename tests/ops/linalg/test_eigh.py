"""Batched eigenproblems: torch's solver, and what cuSOLVER's would be called with."""

from __future__ import annotations

import ctypes
from collections import deque

import pytest
import torch

from vitlr.errors import InputError
from vitlr.ops import explain
from vitlr.ops.backends import cusolver
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.eigh import VARIABLE, BatchError, Key, eigh


def symmetric(b: int = 3, n: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    X = torch.randn(b, n, n, dtype=dtype)
    return X + X.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values(dtype):
    K = symmetric(dtype=dtype)
    energies, U = eigh(K)
    torch.testing.assert_close((U * energies[:, None]) @ U.mT, K)
    assert (energies.diff(dim=-1) >= 0).all()


def test_a_failure_names_the_matrix(monkeypatch):
    K, solve = symmetric(), torch.linalg.eigh

    def fails_on_the_second(x):
        if x.dim() == 3 or torch.equal(x, K[1]):
            raise torch.linalg.LinAlgError("no convergence")
        return solve(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_the_second)
    with pytest.raises(BatchError, match="matrix 1 of the batch: no convergence") as caught:
        eigh(K)
    assert caught.value.index == 1 and isinstance(caught.value, torch.linalg.LinAlgError)


def test_bad_input(monkeypatch):
    with pytest.raises(InputError, match=r"K is \[2, 3, 4\]"):
        eigh(torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="float16"):
        eigh(symmetric().half())
    monkeypatch.setenv(VARIABLE, "magma")
    with pytest.raises(InputError, match="VITLR_EIGH=magma: unknown eigensolver, expected one of torch, cusolver"):
        eigh(symmetric())
    monkeypatch.setenv(VARIABLE, "cusolver")
    with pytest.raises(InputError, match=r"VITLR_EIGH=cusolver: eigh cannot run here \(cusolver: K is on cpu"):
        eigh(symmetric())


def test_a_variable_of_its_own_chooses(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "triton")  # of which there is no eigensolver
    assert eigh(symmetric())[0].shape == (3, 6)
    told = explain("eigh", b=48, n=768)
    assert told.chosen == "torch" and [row.candidate for row in told.rows] == ["torch", "cusolver"]
    assert told.rows[1].why == "K is on cpu, cuSOLVER runs on a CUDA device"
    monkeypatch.setenv(VARIABLE, "torch")
    assert "chosen: VITLR_EIGH=torch" in str(explain("eigh", b=48, n=768))


def test_too_many_matrices_are_told_before_the_call(monkeypatch):
    monkeypatch.setattr(cusolver, "why_not", lambda device: None)
    assert cusolver.objection(Key(2**11, 2**10)) is None
    assert "2049 matrices of n = 1024 are more than" in cusolver.objection(Key(2**11 + 1, 2**10))


class FakeCall:
    """A C function: takes what ctypes would convert, records it, and does what `act` does with the memory."""

    def __init__(self, name, log, act=None, status=0):
        self.name, self.log, self.act, self.status = name, log, act, status
        self.argtypes, self.restype = None, None

    def __call__(self, *args):
        assert len(args) == len(self.argtypes), f"{self.name} takes {len(self.argtypes)} arguments, came {len(args)}"
        # The conversion that a real call makes: raises ArgumentError for what does not fit.
        converted = [kind.from_param(arg) for kind, arg in zip(self.argtypes, args, strict=True)]
        assert len(converted) == len(args)
        self.log.append((self.name, args))
        if self.act is not None:
            self.act(*args)
        return self.status


def value(argument):
    return argument.value if hasattr(argument, "value") else argument


def matrix(pointer, kind, shape):
    """The memory behind a pointer, as a tensor that shares it."""
    size = shape[0] * (shape[1] if len(shape) > 1 else 1) * (shape[2] if len(shape) > 2 else 1)
    return torch.frombuffer((kind * size).from_address(value(pointer)), dtype=DTYPES[kind]).view(shape)


DTYPES = {ctypes.c_double: torch.float64, ctypes.c_float: torch.float32, ctypes.c_int: torch.int32}


class FakeLibrary:
    """libcusolver as its documentation describes it, solved by torch; `info` is what it reports."""

    def __init__(self, status=None, info=None, without=()):
        self.log, status, calls = [], status or {}, {}
        calls["cusolverDnCreate"] = lambda handle: self.set(handle, 0xA)
        calls["cusolverDnCreateParams"] = lambda params: self.set(params, 0xB)
        calls["cusolverDnSetStream"] = None
        calls["cusolverDnXsyevBatched_bufferSize"] = self.buffer_size
        calls["cusolverDnXsyevBatched"] = self.solve
        self.info = info
        for name, act in calls.items():
            if name not in without:
                setattr(self, name, FakeCall(name, self.log, act, status.get(name, 0)))

    @staticmethod
    def set(reference, number):
        reference._obj.value = number

    def buffer_size(self, *args):
        self.set(args[11], 4096)
        self.set(args[12], 64)

    def solve(self, handle, params, jobz, uplo, n, kind_A, A, lda, kind_W, W, kind, device, d, host, h, info, batch):
        assert (value(handle), value(params)) == (0xA, 0xB)
        assert (jobz, uplo, lda) == (1, 1, n), "vectors, upper triangle, dense columns"
        assert kind_A == kind_W == kind and (d, h) == (4096, 64)
        assert value(device) and value(host)
        real = {0: ctypes.c_float, 1: ctypes.c_double}[kind]
        columns = matrix(A, real, (batch, n, n))  # [matrix, column, row]
        upper = columns.mT.triu()
        energies, U = torch.linalg.eigh(upper + upper.triu(1).mT)
        matrix(W, real, (batch, n)).copy_(energies)
        columns.copy_(U.mT)
        matrix(info, ctypes.c_int, (batch,)).copy_(torch.tensor(self.info or [0] * batch, dtype=torch.int32))


class Passed:
    """An event of a stream that the device has not reached, until it has."""

    reached = False

    def query(self):
        return self.reached


@pytest.fixture
def fake(monkeypatch):
    """A function that puts a fake library in the place of the real one, on the CPU."""

    def install(**arguments):
        library = FakeLibrary(**arguments)
        monkeypatch.setattr(registry, "_chosen", {})  # of a device that has no cuSOLVER
        monkeypatch.setattr(cusolver, "_library", lambda: cusolver.declare(library, "libfake.so"))
        monkeypatch.setattr(cusolver, "_handles", {})
        monkeypatch.setattr(cusolver, "why_not", lambda device: None)
        monkeypatch.setattr(cusolver, "_on", lambda device: torch.no_grad())
        monkeypatch.setattr(cusolver, "_stream", lambda device: 0x57)
        monkeypatch.setattr(cusolver, "_kept", deque())
        monkeypatch.setattr(cusolver, "_passed", lambda device: Passed())
        return library

    return install


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cusolver_is_called_as_its_header_says(fake, dtype):
    library, K = fake(), symmetric(dtype=dtype)
    before = K.clone()
    energies, U = eigh(K, "cusolver")
    torch.testing.assert_close((U * energies[:, None]) @ U.mT, K)
    assert torch.equal(K, before), "the input is not the workspace"
    assert [name for name, _ in library.log] == [
        "cusolverDnCreate",
        "cusolverDnCreateParams",
        "cusolverDnSetStream",
        "cusolverDnXsyevBatched_bufferSize",
        "cusolverDnXsyevBatched",
    ]
    stream = next(args for name, args in library.log if name == "cusolverDnSetStream")
    assert [value(argument) for argument in stream] == [0xA, 0x57]
    eigh(K, "cusolver")
    assert [name for name, _ in library.log].count("cusolverDnCreate") == 1, "one handle a device"


def test_cusolver_reads_the_lower_triangle_as_torch_does(fake):
    fake()
    K = symmetric()
    spoilt = K.tril() + torch.randn_like(K).triu(1)
    torch.testing.assert_close(eigh(spoilt, "cusolver")[0], eigh(K)[0])
    torch.testing.assert_close(eigh(spoilt.mT.contiguous().mT, "cusolver")[0], eigh(spoilt)[0])


def test_cusolver_overwrites_only_what_it_may(fake):
    fake()
    K = symmetric()
    expected = eigh(K)[0]
    for given in (K.clone(), K.mT.clone(memory_format=torch.preserve_format)[::1]):
        energies, U, _ = cusolver.syev_batched(given, overwrite=True)
        torch.testing.assert_close(energies, expected)
        torch.testing.assert_close((U * energies[:, None]) @ U.mT, K)
        assert (U.data_ptr() == given.data_ptr()) == given.is_contiguous()


def test_the_hosts_workspace_lives_until_the_stream_is_past(fake, monkeypatch):
    fake()
    eigh(symmetric(), "cusolver")
    eigh(symmetric(), "cusolver")
    first = cusolver._kept[0]
    assert len(cusolver._kept) == 2, "nothing waits, so both calls may still run"
    first[0].reached = True
    eigh(symmetric(), "cusolver")
    assert len(cusolver._kept) == 2 and first not in cusolver._kept
    monkeypatch.setattr(cusolver, "_captured", [])
    monkeypatch.setattr(cusolver, "_passed", lambda device: None)  # a graph is captured, and replayed at any time
    eigh(symmetric(), "cusolver")
    assert len(cusolver._captured) == 1 and len(cusolver._kept) == 2


def test_cusolver_of_nothing_calls_nothing(fake):
    library = fake()
    energies, U = eigh(torch.empty(0, 4, 4), "cusolver")
    assert energies.shape == (0, 4) and U.shape == (0, 4, 4) and not library.log


def test_cusolver_info_names_the_matrix(fake):
    fake(info=[0, 0, 5])
    with pytest.raises(BatchError, match=r"matrix 2 of the batch: cuSOLVER did not converge \(info 5\)"):
        eigh(symmetric(), "cusolver")
    K = symmetric()
    fake(info=[0, 1, 0])
    K[1, 0, 0] = float("nan")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch.linalg, "eigh", lambda x: (x[..., 0], x))  # torch's would raise inside the fake library
    with monkey.context(), pytest.raises(BatchError, match="matrix 1 of the batch: it holds NaN or Inf"):
        eigh(K, "cusolver")
    monkey.undo()


@pytest.mark.parametrize("call", [name for name in cusolver._CALLS])
def test_every_status_is_checked(fake, call):
    fake(status={call: 7})
    with pytest.raises(RuntimeError, match=f"{call} returned status 7: an internal error.*VITLR_EIGH=torch"):
        eigh(symmetric(), "cusolver")


def test_an_old_library_is_told():
    with pytest.raises(InputError, match=r"libold\.so has no cusolverDnXsyevBatched; it comes with CUDA 12\.6\.2"):
        cusolver.declare(FakeLibrary(without=["cusolverDnXsyevBatched"]), "libold.so")


def test_the_limit_of_the_call(fake):
    library = fake()
    with pytest.raises(InputError, match=r"up to 2\^31, not 32768 · 32768 · 3"):
        cusolver.syev_batched(torch.empty(1).expand(3, 2**15, 2**15))
    assert not library.log


def test_why_not(monkeypatch):
    cuda = torch.device("cuda")
    assert "runs on a CUDA device" in (cusolver.why_not(torch.device("cpu")) or "")
    monkeypatch.setattr(torch.version, "hip", None)
    cusolver._library.cache_clear()
    monkeypatch.setattr(cusolver, "_path", lambda: "/nowhere/libcusolver.so.12")
    assert "/nowhere/libcusolver.so.12 does not load" in (cusolver.why_not(cuda) or "")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in (cusolver.why_not(cuda) or "")
    cusolver._library.cache_clear()


def test_the_real_library_has_the_calls():
    """Where torch came with CUDA: it opens without a GPU, and has what the header promises."""
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA")
    cusolver._library.cache_clear()
    try:
        library = cusolver._library()
    except InputError as cause:
        pytest.skip(str(cause))
    assert library.cusolverDnXsyevBatched.restype is ctypes.c_int


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cusolver_on_a_gpu():
    K = symmetric(4, 100).cuda()
    energies, U = eigh(K, "cusolver")
    torch.testing.assert_close((U * energies[:, None]) @ U.mT, K)
