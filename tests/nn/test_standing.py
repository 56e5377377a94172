"""Standing: every change of a tree of modules that a kernel would have to know of is seen."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from vitlr.nn._standing import Standing


def tree():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Dropout(0.0))
    model[1][0].register_buffer("codes", torch.zeros(4, dtype=torch.int8))
    model[1][0].register_buffer("apart", torch.zeros(8)[::2])
    return model


class Listened(nn.Linear):
    pass


def give_data(model):
    model[1][0].weight.data = model[1][0].weight.data.clone()


def give_child(model):
    model[1][1] = nn.GELU()


def give_parameter(model):
    model[0].bias = nn.Parameter(model[0].bias.detach())


def give_class(model):
    model[1][0].__class__ = Listened


CHANGES = {
    "a write to integers": lambda model: model[1][0].codes.add_(1),
    "a write to floats that lie apart": lambda model: model[1][0].apart.add_(1),
    "other memory": give_data,
    "another child": give_child,
    "another parameter": give_parameter,
    "another class": give_class,
    "a parametrization": lambda model: parametrize.register_parametrization(model[1][0], "weight", nn.Identity()),
    "a float": lambda model: setattr(model[0], "eps", 0.5),
    "a mode": lambda model: setattr(model[1][1], "approximate", "tanh"),
    "a rate": lambda model: setattr(model[2], "p", 0.5),
    "a forward": lambda model: setattr(model[1], "forward", lambda x: x),
    "a child more": lambda model: model[1].add_module("more", nn.ReLU()),
    "a child where none was": lambda model: model[1][1].add_module("more", nn.ReLU()),
    "a buffer where none was": lambda model: model[1][0].register_buffer("more", torch.zeros(1)),
    "a child less": lambda model: model.__delitem__(2),
    "a listener": lambda model: model[1][0].register_forward_hook(lambda *_: None),
    "a listener before": lambda model: model[0].register_forward_pre_hook(lambda *_: None),
    "a listener of its own": lambda model: model.register_forward_hook(lambda *_: None),
    "another precision": lambda model: model.bfloat16(),
    "an attribute for another": lambda model: (delattr(model[0], "eps"), setattr(model[0], "forward", lambda x: x)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    model = tree()
    standing = Standing(model)
    model(torch.randn(2, 4))
    assert standing.holds(model)
    change(model)
    assert not standing.holds(model)


@torch.no_grad()
def test_floats_in_one_piece_are_read_where_they_lie():
    model = tree()
    standing = Standing(model)
    model[1][0].weight.add_(1)
    assert standing.holds(model)


def test_who_listens_to_all_modules_is_seen_until_he_goes():
    model = tree()
    standing = Standing(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not standing.holds(model)
    handle.remove()
    assert standing.holds(model)


def test_tensors_whose_writes_nobody_counts_are_not_trusted():
    with torch.inference_mode():
        model = tree()
    assert not Standing(model).holds(model)


def test_it_keeps_no_module_alive():
    model = tree()
    standing, seen = Standing(model), weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None and standing is not None
    finally:
        gc.enable()
