"""One task a thread: order, modes, thread counts and errors are those of a plain loop."""

from __future__ import annotations

import pytest
import torch

from vitlr.ops.linalg.eigh import eigh
from vitlr.ops.linalg.threads import in_threads


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_order_modes_and_thread_counts(threads):
    def told(i):
        return i, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert in_threads(told, range(5)) == [(i, 1, True, False) for i in range(5)]
    with torch.no_grad():
        assert in_threads(told, range(5)) == [(i, 1, False, False) for i in range(5)]
    with torch.inference_mode():
        assert in_threads(told, range(2)) == [(i, 1, False, True) for i in range(2)]
    assert torch.get_num_threads() == threads
    assert in_threads(told, []) == []


def test_errors_come_through_and_the_thread_count_stays(threads):
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, [1, 0, 1])
    assert torch.get_num_threads() == threads


def test_a_batch_of_eigenproblems_is_what_each_is_alone(threads):
    X = torch.randn(5, 130, 130, dtype=torch.float64)
    K = X @ X.mT
    K.requires_grad_()
    energies, U = eigh(K)
    torch.testing.assert_close(U * energies[:, None] @ U.mT, K)
    torch.testing.assert_close(energies, torch.linalg.eigvalsh(K))
    energies.sum().backward()
    torch.testing.assert_close(K.grad, torch.eye(130, dtype=K.dtype).expand(5, -1, -1), rtol=0, atol=1e-10)
