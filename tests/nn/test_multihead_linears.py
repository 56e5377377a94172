"""Torch's own attention as one of linears: the same answers however it is called, and the way back."""

import copy

import pytest
import torch
from torch import nn

from vitlr.errors import InputError
from vitlr.nn import MultiheadLinears

B, T, S, E, H = 3, 5, 7, 16, 4


def assert_close(answer, expected):
    torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)


def pair(**options):
    """Torch's attention in float64 with biases that matter, and the one of linears on its parameters."""
    dense = nn.MultiheadAttention(E, H, **options).double().eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.5)
    return dense, MultiheadLinears.from_dense(dense)


def masks(kind, batch):
    g = torch.Generator().manual_seed(1)
    bools = torch.rand(T, T, generator=g) > 0.6
    bools.fill_diagonal_(False)
    return {
        "none": {},
        "bools": {"attn_mask": bools},
        "floats": {"attn_mask": torch.randn(T, T, generator=g).double()},
        "per head": {"attn_mask": torch.randn(batch * H, T, T, generator=g).double()},
        "padding": {"key_padding_mask": torch.arange(T).expand(batch, T) > 2},
        "padding and floats": {
            "attn_mask": torch.randn(T, T, generator=g).double(),
            "key_padding_mask": (torch.arange(T).expand(batch, T) > 2).double() * -1e3,
        },
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T).double(), "is_causal": True},
    }[kind]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "bools", "floats", "per head", "padding", "padding and floats", "causal"])
def test_self_attention_answers_as_torch_does(kind, batch_first, need_weights):
    dense, linears = pair(batch_first=batch_first)
    x = torch.randn((B, T, E) if batch_first else (T, B, E), dtype=torch.float64)
    how = {"need_weights": need_weights, **masks(kind, B)}
    expected, weights = dense(x, x, x, **how)
    answer, own = linears(x, x, x, **how)
    assert_close(answer, expected)
    assert own is None if weights is None else torch.allclose(own, weights, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}])
def test_queries_keys_and_values_may_differ(options):
    dense, linears = pair(**options)
    first = options.get("batch_first", False)
    query, key, value = (torch.randn((B, n, E) if first else (n, B, E), dtype=torch.float64) for n in (T, S, S))
    for args in ((query, key, value), (query, key, key)):
        expected, weights = dense(*args, average_attn_weights=False)
        answer, own = linears(*args, average_attn_weights=False)
        assert_close(answer, expected)
        assert_close(own, weights)


def test_one_sequence_needs_no_batch():
    dense, linears = pair()
    x, mask = torch.randn(T, E, dtype=torch.float64), torch.randn(H, T, T, dtype=torch.float64)
    for how in ({}, {"attn_mask": mask}, {"need_weights": False}):
        for answer, expected in zip(linears(x, x, x, **how), dense(x, x, x, **how), strict=True):
            assert (answer is None) == (expected is None)
            if expected is not None:
                assert answer.shape == expected.shape
                assert_close(answer, expected)


def test_parameters_are_those_of_the_dense_one_and_so_is_what_comes_back():
    dense, linears = pair()
    assert linears.qkv.weight is dense.in_proj_weight and linears.out_proj.bias is dense.out_proj.bias
    assert linears.to_dense() is dense
    twin = copy.deepcopy(linears)
    back = twin.to_dense()
    assert back is not dense and type(back) is nn.MultiheadAttention and back.in_proj_weight is twin.qkv.weight
    linears.qkv = nn.Linear(E, 3 * E).double()  # other weights: the old module does not hold them
    x = torch.randn(T, B, E, dtype=torch.float64)
    made = linears.to_dense()
    assert made is not dense
    assert_close(made(x, x, x)[0], linears(x, x, x)[0])


def test_gradients_reach_the_parameters_as_through_torch():
    dense, linears = pair()
    x = torch.randn(T, B, E, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (dense, linears):
        x.grad = None
        dense.zero_grad()
        module(x, x, x, need_weights=False)[0].square().sum().backward()
        found.append([x.grad, dense.in_proj_weight.grad, dense.in_proj_bias.grad, dense.out_proj.weight.grad])
    for expected, grad in zip(*found, strict=True):
        assert_close(grad, expected)


def test_dropout_falls_on_the_softmax_in_training_only():
    dense, linears = pair(dropout=0.5)
    x = torch.randn(T, B, E, dtype=torch.float64)
    assert_close(linears(x, x, x)[0], dense(x, x, x)[0])
    linears.train()
    for need_weights in (True, False):
        assert not torch.equal(linears(x, x, x, need_weights=need_weights)[0], linears(x, x, x)[0])


def test_what_cannot_be_made_of_linears_is_said():
    class Own(nn.MultiheadAttention):
        pass

    hooked, within = nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
    hooked.register_forward_hook(lambda *_: None)
    within.out_proj.register_forward_hook(lambda *_: None)
    cases = {
        "not exactly nn.MultiheadAttention": Own(E, H),
        "a width of their own": nn.MultiheadAttention(E, H, kdim=8),
        "adds a key and a value": nn.MultiheadAttention(E, H, add_bias_kv=True),
    }
    for reason, module in (*cases.items(), ("has hooks", hooked), ("has hooks", within)):
        with pytest.raises(InputError, match=reason):
            MultiheadLinears.from_dense(module)
    with pytest.raises(InputError, match="is_causal=True says what attn_mask is"):
        x = torch.randn(T, B, E, dtype=torch.float64)
        pair()[1](x, x, x, is_causal=True)
