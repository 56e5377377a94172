"""The CUDA candidates of the solve: all of their host's side, with the kernels emulated and an eigensolver of torch's.

The emulation runs the blocks of csrc/cuda thread by thread (tests/csrc/test_solve_kernels.py); addresses, strides,
flags and workspaces are those that a GPU would get.
"""

from __future__ import annotations

import pytest
import solve_emulation as emulation
import spectra_cases
import torch
from torch import nn

from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition import ranks
from vitlr.decomposition.solving import decompose
from vitlr.errors import InputError
from vitlr.ops import explain
from vitlr.ops.backends import cuda_solve, cusolver, native
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg import batched_solve, weighted_gram_chain
from vitlr.ops.linalg.batched_solve import JITTERS, Key
from vitlr.ops.linalg.eigenproblems import solve_batch, weighted_svd
from vitlr.ops.linalg.eigh import BatchError
from vitlr.runtime.storage import fingerprint

F64 = torch.float64
CUDA = torch.device("cuda", 0)
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or native.cuda_why_not(CUDA) is not None, reason="no GPU, or vitlr._cuda not built"
)


@pytest.fixture
def emulated(monkeypatch):
    """The candidates on CPU tensors; the list of the calls made."""
    calls: list[str] = []

    def cuda_call(name, *arguments, device):
        calls.append(name)
        emulation.call(name, *arguments, mode=3)

    def syev_batched(K, *, overwrite=False):
        calls.append("syev")
        assert K.isfinite().all(), "nobody knows what cuSOLVER makes of NaN"
        energies, U = torch.linalg.eigh(K)
        U = U.mT.contiguous().mT  # as cuSOLVER leaves them: one vector after the other
        if overwrite:
            K.fill_(float("nan"))
        return energies, U, torch.zeros(len(K), dtype=torch.int32)

    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    monkeypatch.setattr(native, "cuda_call", cuda_call)
    monkeypatch.setattr(cusolver, "syev_batched", syev_batched)
    return calls


@pytest.fixture
def asked_for(emulated, monkeypatch):
    """The same, taken by dispatch for CPU tensors where VITLR_BACKEND=cuda asks for it."""
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: None)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    monkeypatch.setattr(cusolver, "why_not", lambda device: None)
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    registry._chosen.clear()
    yield emulated
    registry._chosen.clear()


def moments(n: int, names=spectra_cases.CASES) -> tuple[torch.Tensor, torch.Tensor]:
    """M [b, n, n] of the cases of those names, F of their weights with a floor, as decompositions are."""
    pairs = [spectra_cases.case(name, n) for name in names]
    M, F = torch.stack([C for _, C in pairs]), torch.stack([W.mT @ W for W, _ in pairs])
    level = F.diagonal(dim1=-2, dim2=-1).mean(-1)
    return M, F + 0.01 * level[:, None, None] * torch.eye(n, dtype=F64)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 70, 64), (1, 64, 130), (3, 1, 1)], ids=str)
def test_chain(emulated, shape):
    b, m, k = shape
    W, C = torch.randn(b, m, k, dtype=F64), torch.randn(b, k, k, dtype=F64)
    C = C + C.mT
    expected = weighted_gram_chain.reference(W, C)
    for given in (W, W.mT.contiguous().mT):
        Y = cuda_solve.chain(given, C)
        assert torch.equal(Y, Y.mT) and Y.is_contiguous()
        torch.testing.assert_close(Y, expected, rtol=1e-12, atol=1e-12 * k)


@pytest.mark.parametrize("n", [1, 40, 130])
def test_the_solve_is_that_of_the_reference(emulated, n):
    M, F = moments(n) if n > 1 else (torch.full((2, 1, 1), 3.0, dtype=F64), torch.full((2, 1, 1), 2.0, dtype=F64))
    energies, P, Q = cuda_solve.solve(M, F)
    expected = batched_solve.reference(M, F)
    scale = expected[0][:, :1]
    torch.testing.assert_close(energies / scale, expected[0] / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(Q @ P, torch.eye(n, dtype=F64).expand_as(Q), rtol=0, atol=1e-9)
    for r in {1, n // 4, n // 2} - {0}:  # the same space, whatever signs and bases: P_r Q_r loses what it must
        rest = torch.eye(n, dtype=F64) - P[:, :, :r] @ Q[:, :r]
        lost = ((rest.mT @ F @ rest) * M).sum((-2, -1))
        least = expected[0][:, r:].sum(-1)
        assert ((lost - least).abs() <= 1e-7 * least + 1e-13 * expected[0].sum(-1)).all()
    assert emulated == ["cholesky", "weighted_chain", "weighted_chain", "syev", "back_substitution", "weighted_chain"]


def test_without_a_second_moment_only_the_eigensolver_runs(emulated):
    M, _ = moments(30)
    energies, P, Q = cuda_solve.solve(M)
    torch.testing.assert_close(energies, batched_solve.reference(M)[0])
    assert torch.equal(P.mT, Q) and emulated == ["syev"]


def test_moments_in_any_strides_are_left_as_they_were(emulated):
    M, F = moments(70, ("mild", "outlier"))
    before = M.clone(), F.clone()
    plain = cuda_solve.solve(M, F)
    other = cuda_solve.solve(torch.stack([M, M], -1)[..., 0], torch.cat([F, F], 2)[:, :, :70])
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(M, before[0]) and torch.equal(F, before[1])


def test_only_the_members_that_need_it_get_more_jitter(emulated):
    M, F = moments(20, ("mild", "outlier", "clustered"))
    alone = cuda_solve.solve(M, F)
    F[1] = F[1][:, :3] @ F[1][:3] - 3e-7 * F[1].trace() / 20 * torch.eye(20, dtype=F64)
    F[1] = (F[1] + F[1].mT) / 2
    F[1] = torch.outer(F[1][0], F[1][0])  # of rank one
    F[1] -= 3e-7 * F[1].trace() / 20 * torch.eye(20, dtype=F64)  # and fp32 noise below zero in empty directions
    emulated.clear()
    energies, P, Q = cuda_solve.solve(M, F)
    assert emulated.count("cholesky") == 1 + sum(jitter < 5e-7 for jitter in JITTERS)
    expected = batched_solve.reference(M, F)
    torch.testing.assert_close(energies[1], expected[0][1], rtol=1e-6, atol=1e-9 * float(expected[0][1, 0]))
    for i in (0, 2):
        assert all(torch.equal(new[i], old[i]) for new, old in zip((energies, P, Q), alone, strict=True))
    torch.testing.assert_close(Q @ P, torch.eye(20, dtype=F64).expand_as(Q), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1e9, float("nan"), float("inf")])
def test_what_is_not_semidefinite_is_named(emulated, wrong):
    M, F = moments(20, ("mild", "outlier"))
    F[1, 5, 5] = wrong
    with pytest.raises(BatchError, match="matrix 1 of the batch: its gradient moment is not positive") as caught:
        cuda_solve.solve(M, F)
    assert caught.value.index == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_what_does_not_converge_is_named(emulated, monkeypatch, weighted):
    M, F = moments(20, ("mild", "outlier"))
    syev = cusolver.syev_batched

    def fails(K, **options):
        energies, U, info = syev(K, **options)
        return energies, U, info + torch.tensor([0, 7], dtype=torch.int32)

    monkeypatch.setattr(cusolver, "syev_batched", fails)
    with pytest.raises(BatchError, match=r"matrix 1 of the batch: cuSOLVER did not converge \(info 7\)"):
        cuda_solve.solve(M, F if weighted else None)


def test_it_is_a_candidate_that_runs_when_asked_for(asked_for):
    M, F = moments(30, ("mild", "outlier"))
    energies, _, _ = solve_batch(M, F)
    torch.testing.assert_close(energies, batched_solve.reference(M, F)[0], rtol=1e-9, atol=1e-12)
    assert "back_substitution" in asked_for


def test_decompose_takes_it_for_its_batches(asked_for, monkeypatch):
    model, layers = nn.ModuleDict(), {}
    for name, K, N in (("a", 12, 20), ("b", 20, 12), ("c", 12, 12)):
        model[name] = nn.Linear(K, N, dtype=F64)
        X, D = torch.randn(60, K, dtype=F64), torch.randn(60, N, dtype=F64)
        seen, back = (X @ model[name].weight.detach().mT, D) if N <= K else (X, D @ model[name].weight.detach())
        layers[name] = LayerStatistics(name, K, N, name, 60, moment=seen.mT @ seen, gradient=back.mT @ back)
    weights = {name: layer.weight.detach() for name, layer in model.items()}
    stats = Statistics(layers, fingerprint(weights), ("loss",), images=1)
    one_by_one = decompose(model, stats)
    monkeypatch.setattr(ranks, "_one_by_one", ranks._in_batches)
    assert not asked_for, "on a CPU LAPACK does it, whatever back-end is asked for"
    batched = decompose(model, stats)
    assert asked_for.count("cholesky") == 1, "one batch of three"
    for name, layer in one_by_one.layers.items():
        torch.testing.assert_close(batched.layers[name].energies, layer.energies, rtol=1e-9, atol=1e-12)


def test_triton_takes_the_part_it_has(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "triton")
    M, F = moments(8, ("mild",))
    candidate = next(c for c in registry.candidates("weighted_gram_chain") if c.name == "triton.chain")
    if candidate.supports(weighted_gram_chain.Key(1, 8, 8)) is not None:
        pytest.skip("Triton does not run here")
    taken = registry.select("batched_solve", Key(1, 8))
    assert taken.name == "triton.chain"
    torch.testing.assert_close(taken.run(M, F)[0], batched_solve.reference(M, F)[0])


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_weighted_svd_from_weights_to_factors(asked_for, side, weighted):
    b, N, K = 2, 40, 24
    W, X, Z = (torch.randn(b, *size, dtype=F64) for size in ((N, K), (300, K), (300, N)))
    Y = X @ W.mT
    n = N if side == "output" else K
    seen, back = (Y, Z) if side == "output" else (X, Z @ W)
    M, F = seen.mT @ seen, back.mT @ back if weighted else None
    _, errors, A, B = weighted_svd(W, M, F, side=side)
    assert A.shape == (b, N, n) and B.shape == (b, n, K) and errors.shape == (b, n + 1) and not errors[:, -1].any()
    for r in (1, 5, 20):
        D = W - A[:, :, :r] @ B[:, :r]
        if side == "output" or not weighted:
            lost = D @ (X.mT @ X) @ D.mT
            lost = lost if F is None else F @ lost
        else:  # ‖Z (W − A B)‖ with the inputs' moment
            lost = (Z @ D) @ (X.mT @ X) @ (Z @ D).mT
        torch.testing.assert_close(lost.diagonal(dim1=-2, dim2=-1).sum(-1), errors[:, r], rtol=1e-7, atol=1e-7)


def test_weighted_svd_says_what_does_not_fit():
    W = torch.ones(2, 4, 3)
    with pytest.raises(InputError, match="side='left', expected 'output' or 'input'"):
        weighted_svd(W, torch.ones(2, 4, 4), side="left")
    with pytest.raises(InputError, match=r"W is \[2, 4, 3\] and M \[2, 4, 4\], expected .* square of its inputs"):
        weighted_svd(W, torch.ones(2, 4, 4), side="input")


def test_it_is_never_taken_by_default(monkeypatch):
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: None)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    monkeypatch.setattr(cusolver, "why_not", lambda device: None)
    for op, shape in (("batched_solve", {"b": 48, "n": 768}), ("weighted_gram_chain", {"b": 48, "m": 768, "k": 768})):
        found = explain(op, **shape, device="cuda")
        row = next(row for row in found.rows if row.candidate.startswith("cuda."))
        assert found.chosen == "torch" and row.runs and row.why.startswith("compiled, not run") and not row.ran_on


@pytest.mark.parametrize(
    ("key", "built", "capability", "reason"),
    [
        (Key(2, 8, dtype=torch.float32, device=CUDA), None, 90, "float32, these kernels are for torch.float64"),
        (Key(2, 8, device=CUDA), "vitlr._cuda was not built: no nvcc", 90, "was not built: no nvcc"),
        (Key(2, 8, device=CUDA), None, 75, "compute capability 8.0"),
        (Key(2**15, 768, device=CUDA), None, 90, r"32768 matrices of n = 768 are more"),
        (Key(2, 8), None, 90, "K is on cpu"),
    ],
    ids=["dtype", "not built", "old", "too many", "cpu"],
)
def test_it_says_why_not(monkeypatch, key, built, capability, reason):
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: built)
    monkeypatch.setattr(native, "capability", lambda device: capability)
    if key.device.type == "cuda":
        monkeypatch.setattr(cusolver, "why_not", lambda device: None)
    candidate = next(c for c in registry.candidates("batched_solve") if c.name == "cuda.fused")
    assert reason.replace("\\", "") in (candidate.supports(key) or "")


@pytest.mark.parametrize(("capability", "pays"), [(80, True), (89, False), (90, True), (120, False)])
def test_it_does_not_pay_where_fp64_is_slow(monkeypatch, capability, pays):
    monkeypatch.setattr(native, "capability", lambda device: capability)
    for op, key in (("batched_solve", Key(2, 8)), ("weighted_gram_chain", weighted_gram_chain.Key(2, 8, 8))):
        candidate = next(c for c in registry.candidates(op) if c.backend == "cuda")
        assert (candidate.worth(key) is None) == pays


def test_wrong_input_is_told():
    M = torch.ones(2, 3, 3, dtype=F64)
    with pytest.raises(InputError, match=r"M is \[2, 3, 4\]"):
        batched_solve.batched_solve(torch.ones(2, 3, 4))
    with pytest.raises(InputError, match=r"F is torch\.float32 on cpu, M is torch\.float64"):
        batched_solve.batched_solve(M, M.float())
    assert [x.shape for x in batched_solve.batched_solve(M[:0], M[:0])] == [(0, 3), (0, 3, 3), (0, 3, 3)]


@ON_GPU
def test_on_a_gpu():
    M, F = moments(200)
    expected = batched_solve.reference(M, F)
    energies, P, Q = cuda_solve.solve(M.cuda(), F.cuda())
    torch.testing.assert_close(energies.cpu(), expected[0], rtol=1e-9, atol=1e-12 * float(expected[0].max()))
    torch.testing.assert_close((Q @ P).cpu(), torch.eye(200, dtype=F64).expand(len(M), -1, -1), rtol=0, atol=1e-9)
