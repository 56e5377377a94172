"""Whatever tensors an op is called with, it answers or says what does not fit; nothing of torch's comes through."""

import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from vitlr.errors import VitlrError
from vitlr.ops.backends import native
from vitlr.ops.layers.attention import attention
from vitlr.ops.layers.lowrank_glu import lowrank_glu
from vitlr.ops.layers.lowrank_linear import lowrank_linear
from vitlr.ops.layers.lowrank_mlp import lowrank_mlp
from vitlr.ops.layers.lowrank_residual_linear import lowrank_residual_linear
from vitlr.ops.linalg.batched_solve import batched_solve
from vitlr.ops.linalg.eigh import eigh
from vitlr.ops.linalg.gram import gram_update_
from vitlr.ops.linalg.weighted_gram_chain import weighted_gram_chain

DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
]  # fmt: skip


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def moments():
    A = rand(2, 8, 8).double()
    return A @ A.mT


LOW = (rand(3, 8), rand(12, 3), rand(12))
CALLS = {
    lowrank_linear: [rand(5, 8), rand(3, 8), rand(6, 3), rand(6), rand(5, 6)],
    lowrank_mlp: [rand(5, 8), *LOW, rand(4, 12), rand(8, 4), rand(8), rand(5, 8)],
    lowrank_glu: [rand(5, 8), *LOW, *LOW, rand(4, 12), rand(8, 4), rand(8), rand(5, 8)],
    lowrank_residual_linear: [rand(5, 8), rand(3, 8), rand(6, 3), rand(6, 8).to(torch.int8), rand(6, 1), rand(6)],
    attention: [rand(2, 2, 5, 4)] * 3,
    gram_update_: [torch.zeros(8, 8, dtype=torch.float64), rand(20, 8), rand(20).abs()],
    eigh: [moments()],
    batched_solve: [moments(), moments()],
    weighted_gram_chain: [rand(2, 5, 8).double(), moments()],
}


def odd(tensor, rng):
    kind = rng.randrange(6)
    shape = [rng.choice([1, 2, 3, 8]) for _ in range(rng.randrange(5))]
    return [
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor.reshape(-1),
        lambda: tensor[..., :0],
        lambda: tensor[:0],
        lambda: tensor.to_sparse(),
        lambda: rand(*shape),
    ][kind]()


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_dtypes_layouts_and_shapes_that_do_not_fit_are_said_by_our_own_error(op):
    rng, refused = random.Random(0), 0
    op(*CALLS[op])
    for i in range(250):
        args = list(CALLS[op])
        if i % 4 == 0:
            dtype = rng.choice(DTYPES)
            args = [tensor.to(dtype) for tensor in args]
        else:
            for j in rng.sample(range(len(args)), min(rng.randint(1, 2), len(args))):
                args[j] = odd(args[j], rng)
        told = [(str(tensor.dtype), list(tensor.shape), str(tensor.layout)) for tensor in args]
        try:
            op(*args)
        except VitlrError as cause:
            assert len(str(cause)) > 10
            refused += 1
        except Exception as cause:
            pytest.fail(f"{type(cause).__name__}: {cause}\n{told}")
    assert refused > 100


@pytest.mark.skipif(not native.available() or not hasattr(os, "fork"), reason="needs the native extension and fork")
def test_a_child_runs_what_its_parent_has_imported_and_never_called():
    code = """
        import os
        import torch
        from vitlr.ops.linalg.gram import gram_update_
        torch.set_num_threads(2)
        torch.randn(4_000_000).exp().sum()  # a pool of threads that the child will not have
        if os.fork() == 0:
            torch.set_num_threads(2)
            gram_update_(torch.zeros(64, 64, dtype=torch.float64), torch.randn(4096, 64))
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    try:
        assert parent.communicate(timeout=120)[0].strip() == "7"
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
