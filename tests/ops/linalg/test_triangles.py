"""A symmetric matrix and its upper triangle are one and the same."""

import pytest
import torch

from vitlr.ops.linalg.gram import gram_update_
from vitlr.ops.linalg.triangles import length, order, square, triangle


@pytest.mark.parametrize("n", [1, 2, 7, 256, 300])
def test_there_and_back_is_where_it_was(n):
    C = torch.randn(n, n, dtype=torch.float64)
    C = C + C.mT
    half = triangle(C)
    assert len(half) == length(n) and order(len(half)) == n
    assert torch.equal(half, C[torch.triu(torch.ones(n, n, dtype=torch.bool))])
    assert torch.equal(square(half), C)


@pytest.mark.parametrize("backend", ["torch", None])
def test_the_gram_update_adds_to_a_triangle(backend, monkeypatch):
    if backend:
        monkeypatch.setenv("VITLR_BACKEND", backend)
    X, whole = torch.randn(90, 70), torch.zeros(70, 70, dtype=torch.float64)
    half = triangle(whole)
    for rows in X.split(40):
        gram_update_(whole, rows)
        gram_update_(half, rows)
    torch.testing.assert_close(square(half), whole, rtol=1e-13, atol=1e-12)
