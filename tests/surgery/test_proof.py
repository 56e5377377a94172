"""A compressed copy runs its own modules, and its answer depends on them; else it is refused with the reason."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.runtime.copies import duplicate
from vitlr.surgery.proof import prove


def compressed(model, batches, **options):
    return vitlr.compress(model, batches, "params:70%", rank_step=4, method="lowrank", **options)


def wrapped_whole(model):
    model.forward = torch.compile(model.forward, backend="eager")


def wrapped_attention(model):
    for block in model.blocks:
        block.attn.forward = lambda x, _f=block.attn.forward, **k: _f(x)


def wrapped_by_closure(model):
    def around(old):
        return lambda x: old(x)

    model.blocks[0].mlp.forward = around(model.blocks[0].mlp.forward)


WRAPS = (wrapped_whole, wrapped_attention, wrapped_by_closure)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_forward_that_would_run_the_original_is_refused_in_a_copy(tiny_vit, batches, wrap):
    model = tiny_vit()
    wrap(model)
    with pytest.raises(InputError, match=r"forward was put there by hand .*inplace=True"):
        compressed(model, batches)
    for copied in (vitlr.fuse, vitlr.unfuse, vitlr.to_dense, duplicate):
        with pytest.raises(InputError, match="would run the original"):
            copied(model)


def adapter_in_a_hook(model):
    model.adapter = nn.Linear(32, 32)
    model.blocks[0].register_forward_hook(lambda block, args, out: out + model.adapter(args[0]))


def norm_in_a_table(model):
    model.steps = {"norm": [lambda x: model.norm(x)]}


def cached_forward(model):
    model.norm.forward = functools.lru_cache(maxsize=0)(model.norm.forward)


def weak_reference(model):
    whole = weakref.ref(model)
    model.norm.forward = lambda x: F.layer_norm(x, x.shape[-1:], whole().norm.weight, whole().norm.bias, 1e-6)


def object_in_a_closure(model):
    kept = types.SimpleNamespace(forward=model.norm.forward)
    model.norm.forward = lambda x: kept.forward(x)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (adapter_in_a_hook, r"blocks\.0\._forward_hooks"),
        (norm_in_a_table, "steps"),
        (cached_forward, r"norm\.forward"),
        (weak_reference, r"norm\.forward"),
        (object_in_a_closure, r"norm\.forward"),
    ],
)
def test_functions_in_hooks_and_tables_that_would_run_the_original_are_refused(tiny_vit, batches, wrap, where):
    """What they run is not compressed, so the copy's answer is right until its own weights change."""
    model = tiny_vit()
    wrap(model)
    with pytest.raises(InputError, match=rf"{where} was put there by hand and holds on to this very model"):
        compressed(model, batches)


norm = nn.LayerNorm(32)  # a global of the name that hooks below read as an attribute


def test_hooks_that_follow_a_copy_or_only_look_are_fine(tiny_vit, batches):
    class Watching(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.seen, self.norm = net, [], norm
            net.blocks[0].register_forward_hook(self.watch)  # bound: deepcopy binds it again
            net.blocks[1].register_forward_hook(lambda block, args, out: block.norm1 and None)

        def watch(self, block, args, out):
            self.seen[:] = [out.detach(), self.norm]

        def forward(self, x):
            return self.net(x) + self.seen[0].mean()

    model = Watching(tiny_vit()).eval()
    small = compressed(model, batches)
    model.seen = None  # of the original
    assert not torch.equal(small(batches[0][0]), small(batches[1][0]))


@pytest.mark.parametrize("wrap", WRAPS)
def test_in_place_such_a_model_runs_what_is_new(tiny_vit, batches, wrap):
    model, plain = tiny_vit(), tiny_vit()
    wrap(model)
    small = compressed(model, batches, inplace=True)
    assert small is model
    torch.testing.assert_close(small(batches[0][0]), compressed(plain, batches)(batches[0][0]))


def test_hand_written_forwards_that_follow_a_copy_are_fine(tiny_vit, batches):
    model = tiny_vit()
    model.forward = model.forward  # bound, as some libraries keep it: deepcopy binds it again
    small = compressed(model, batches)
    assert not torch.equal(small(batches[0][0]), model(batches[0][0]))


class Net(nn.Module):
    """Two linears; how the second one is used varies."""

    def __init__(self, use):
        super().__init__()
        self.one, self.two, self.head, self.use = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), use

    def forward(self, x):
        return self.head(self.use(self, self.one(x)))


X = torch.randn(1, 6)


def test_what_is_not_called_or_does_not_count_is_refused():
    Net.spare = nn.Linear(8, 8)  # of the class: no copy has it for its own
    for use, message in (
        (lambda net, h: Net.spare(h), "1 of 2 new modules are not called .two."),
        (lambda net, h: (net.two(h), h)[1], "the answer does not depend on them .two."),
        (lambda net, h: net.two(h) @ torch.eye(3), "does not run with its new modules .RuntimeError"),
    ):
        with pytest.raises(InputError, match=message):
            prove(Net(use), ["one", "two"], X)
    prove(Net(lambda net, h: net.two(h).detach()), ["two"], X)  # without a gradient it is tried out
    with torch.no_grad():
        prove(Net(lambda net, h: h + net.two(h)).requires_grad_(False), ["one", "two"], X)


def test_what_the_original_cannot_do_either_is_not_held_against_the_copy(caplog):
    broken = Net(lambda net, h: h @ torch.eye(3))
    prove(broken, ["one"], X, original=broken)
    assert "could not be tried on an image" in caplog.text


def test_kept_activations_are_copied_without_their_graph_and_calibration_leaves_none(tiny_vit, batches):
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.maps = []
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: setattr(module, "attention_map", out))
        block.mlp.register_forward_hook(lambda module, args, out, kept=block.attn.maps: kept.append((out,)))
    small = compressed(model, batches)
    assert not torch.equal(small(batches[0][0]), model(batches[0][0]))
    vitlr.calibrate(model, batches)
    for block in model.blocks:
        assert not block.attn.attn_drop.attention_map.requires_grad
        assert all(t.grad_fn is None for (t,) in block.attn.maps)
    model(batches[0][0])  # keeps some with a graph again
    assert duplicate(model).blocks[0].attn.attn_drop.attention_map.grad_fn is None


def test_refinement_refuses_a_model_whose_layers_are_not_called(tiny_vit, batches):
    model = tiny_vit()
    small = compressed(model, batches)
    small.blocks[1].forward = model.blocks[1].forward  # of the dense model
    images = [torch.randn(32, 3, 32, 32)]
    with pytest.raises(InputError, match="4 of 6 new modules are not called"):
        vitlr.refine(small, model, images, rungs=["distil"], steps=1)


def test_gates_that_are_not_called_are_refused(tiny_vit, batches):
    from vitlr.training import TrainRecipe

    model, other = tiny_vit(), tiny_vit()
    model.blocks[1].forward = other.blocks[1].forward
    with pytest.raises(InputError, match=r"new modules are not called \(blocks\.1"):
        vitlr.prune(model, batches, 0.3, recipe=TrainRecipe(epochs=1))


class Box:
    """An object of no special kind that keeps what it is given."""

    def __init__(self):
        self.last = None

    def append(self, value):
        self.last = value


@pytest.mark.parametrize("place", [Box, list, lambda: deque(maxlen=2)])
def test_activations_kept_with_their_graph_are_copied_and_left_without_one(tiny_vit, batches, place):
    model = tiny_vit()
    model.place = place()
    model.blocks[0].mlp.register_forward_hook(lambda module, args, out, to=model.place: to.append(out))
    model(batches[0][0])
    duplicate(model)
    vitlr.calibrate(model, batches)
    kept = [model.place.last] if isinstance(model.place, Box) else list(model.place)
    assert kept and all(tensor.grad_fn is None for tensor in kept)
