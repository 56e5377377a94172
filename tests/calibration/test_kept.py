"""Activations that wait for gradients take no memory of their own where autograd can make them again."""

import weakref

import pytest
import torch
import torch.nn.functional as F

import vitlr
from tests.tolerance import assert_close_to
from vitlr.calibration.kept import kept


def rows(seed=0):
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(seed))


MADE = {
    "gelu": lambda x, _=torch.float32: F.gelu(x),
    "gelu by tanh": lambda x, _=torch.float32: F.gelu(x, approximate="tanh"),
    "layer norm": lambda x, dtype=torch.float32: F.layer_norm(
        x, (12,), rows(1)[0].to(dtype), rows(2)[0].to(dtype), 1e-3
    ),
    "layer norm without weights": lambda x, _=torch.float32: F.layer_norm(x, (12,)),
}


@pytest.mark.parametrize("name", MADE)
def test_what_autograd_can_make_again_is_not_held(name):
    made = MADE[name](rows().requires_grad_())
    again, expected = kept(made), made.detach().clone()
    # With a graph hanging on it, as a layer that reads it would leave: the graph alone keeps what made it.
    behind, held = made * 2, weakref.ref(made)
    del made
    assert held() is None
    assert_close_to(again(), expected, MADE[name](rows().double(), torch.float64))
    behind.sum().backward()


def test_all_else_is_held_as_it_is():
    x = rows().requires_grad_()
    for t in (x.relu(), x.detach(), x * 2):
        assert kept(t)().data_ptr() == t.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        t = F.gelu(x)
        assert kept(t)().data_ptr() == t.data_ptr()


def test_the_graph_of_a_batch_is_gone_before_the_next_one_is_read(tiny_vit, batches):
    model, answers, read = tiny_vit(), [], 0
    handle = model.register_forward_hook(lambda module, args, output: answers.append(weakref.ref(output)))

    def images():
        nonlocal read
        for batch in batches:
            assert all(answer() is None for answer in answers)
            read += 1
            yield batch

    vitlr.calibrate(model, images(), objective="fisher", hidden=True)
    handle.remove()
    assert read > 1 and len(answers) > read
