"""Directions of queries and keys: what is measured, that rotating is exact, what goes first, which attentions can."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import make
from solved import solved
from torch import nn

import vitlr
from vitlr.anatomy import attention as attention_surface
from vitlr.anatomy.attention import attentions, score_attentions, why_no_scores
from vitlr.decomposition.query_key_widths import SCALE
from vitlr.errors import InputError, NumericalError
from vitlr.measuring import cost
from vitlr.nn import SelectedLinear
from vitlr.surgery.attention import narrow_query_keys

# plain, windows with a bias of their positions, attention pooling beside it
FAMILIES = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224"]


def loss(output, batch):
    return output.float().logsumexp(1).sum()


@pytest.fixture(scope="module")
def calibrated(tiny_vit):
    model = tiny_vit(num_heads=4)
    images = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2)) for _ in range(3)]
    return model, vitlr.calibrate(model, images, objective=("loss", "fisher"), hidden=True)


def test_every_sum_matches_its_definition(tiny_vit, images):
    model = tiny_vit(num_heads=4)
    stats = vitlr.calibrate(model, list(images.split(4)), hidden=True, loss_fn=loss)
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen["qkv"] = output

    handle = model.blocks[1].attn.qkv.register_forward_hook(keep)
    loss(model(images), None).backward()
    handle.remove()
    q, g = (
        t[..., :32].unflatten(-1, (4, 8)).transpose(1, 2).double() for t in (seen["qkv"].detach(), seen["qkv"].grad)
    )
    P = q.mT @ g
    layer = stats.layers["blocks.1.attn.qkv"]
    for key, expected in {
        "score_moment": q.mT @ q,
        "score_gradient": g.mT @ g,
        "image_score_moment": P @ P.mT,
        "image_score_gradient": P.mT @ P,
    }.items():
        torch.testing.assert_close(layer.sum(key), expected.sum(0), rtol=2e-5, atol=1e-9)
        for other in ("blocks.1.attn.proj", "blocks.1.mlp.fc1"):
            assert getattr(stats.layers[other], key) is None
    plain = vitlr.calibrate(model, [images], hidden=False).layers["blocks.1.attn.qkv"]
    assert plain.score_moment is None  # nobody asked for what pruning needs
    only = vitlr.calibrate(model, [images], objective="loss", hidden=True).layers["blocks.1.attn.qkv"]
    assert only.score_gradient is not None and only.image_score_moment is None


def test_gradients_by_image_are_those_of_the_product(tiny_vit, images):
    """P of one image is the gradient of its loss by B in the scores `qᵀ B k`, which is what dropping changes."""
    model = tiny_vit(num_heads=4)
    stats = vitlr.calibrate(model, [images[:1]], hidden=True, loss_fn=loss)
    attention = model.blocks[1].attn
    B = torch.eye(8).repeat(4, 1, 1).requires_grad_()

    def forward(x, **_):
        q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q @ B, k, v)
        return attention.proj(y.transpose(1, 2).flatten(2))

    attention.forward = forward
    loss(model(images[:1]), None).backward()
    layer = stats.layers["blocks.1.attn.qkv"]
    torch.testing.assert_close(layer.image_score_moment, (B.grad @ B.grad.mT).double(), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(layer.image_score_gradient, (B.grad.mT @ B.grad).double(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_rotating_is_exact_and_directions_that_nothing_needs_are_free(name):
    model, images = make(name)
    model = model.double()
    for attention in score_attentions(model, [n for n, _ in model.named_modules()]).values():
        linear = model.get_submodule(attention.queries_keys[0])
        with torch.no_grad():  # the last direction of every query is a copy of the first one
            rows = torch.arange(attention.width).view(attention.heads, -1)
            linear.weight[rows[:, -1]] = linear.weight[rows[:, 0]]
            if linear.bias is not None:
                linear.bias[rows[:, -1]] = linear.bias[rows[:, 0]]
    images = images.double()
    stats = vitlr.calibrate(model, [images], hidden=True)
    spectra = solved(model, stats, "query_keys")
    expected, rotated, cut = model(images), copy.deepcopy(model), copy.deepcopy(model)
    assert spectra
    for spectrum in spectra.values():
        narrow_query_keys(rotated, spectrum, spectrum.full_width)
        width = spectrum.full_width - spectrum.attention.heads
        assert spectrum.errors[width] <= 1e-9 * spectrum.errors[0]
        narrow_query_keys(cut, spectrum, width)
        for linear in spectrum.attention.queries_keys:
            assert isinstance(cut.get_submodule(linear), SelectedLinear)
    torch.testing.assert_close(rotated(images), expected)
    torch.testing.assert_close(cut(images), expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())


class Apart(nn.Module):
    """Attention with a linear each for q, k and v, as transformers writes it."""

    def __init__(self, attention):
        super().__init__()
        self.num_heads, self.proj = attention.num_heads, attention.proj
        width = attention.qkv.in_features
        for name, part in zip(("q_proj", "k_proj", "v_proj"), range(3), strict=True):
            linear, rows = nn.Linear(width, width), slice(part * width, (part + 1) * width)
            linear.weight, linear.bias = (nn.Parameter(p.detach()[rows]) for p in attention.qkv.parameters())
            setattr(self, name, linear)

    def forward(self, x, **_):
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_linears_of_their_own_are_the_packed_one_in_parts(tiny_vit, images, monkeypatch):
    for name in ("_KNOWN", "_PLAIN"):
        monkeypatch.setattr(attention_surface, name, getattr(attention_surface, name) | {f"{__name__}.Apart"})
    packed, apart = tiny_vit(num_heads=4), tiny_vit(num_heads=4)
    for block in apart.blocks:
        block.attn = Apart(block.attn)
    found = []
    for model in (packed, apart):
        stats = vitlr.calibrate(model, [images], hidden=True)
        spectrum = solved(model, stats, "query_keys")["blocks.1.attn"]
        for quantity in ("params:50%", "macs:50%", "bytes:52%"):
            plan = vitlr.plan(model, stats, quantity, method="widths", attention="query_keys", width_step=4)
            small, budget = vitlr.apply(model, plan), vitlr.parse_budget(quantity)
            now = cost.measure(small, (3, 32, 32))
            assert (plan.params_kept, plan.macs_kept, plan.bytes_kept) == (now.params, now.macs, now.bytes)
            assert getattr(plan, f"{budget.quantity}_kept") <= budget.limit(getattr(plan, budget.quantity))
            assert any(row.kind == "query_keys" and row.width < row.full_width for row in plan.widths)
        narrow_query_keys(model, spectrum, 16)
        found.append(model(images))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_shared_weights_stay_as_they_are(calibrated):
    model, stats = calibrated
    small = copy.deepcopy(model)
    shared = small.blocks[1].attn.qkv.weight
    before = shared.detach().clone()
    narrow_query_keys(small, solved(model, stats, "query_keys")["blocks.1.attn"], 16)
    assert torch.equal(shared, before) and small.blocks[1].attn.qkv.linear.out_features == 2 * 16 + 32


def test_what_goes_is_what_costs_least(calibrated, images):
    model, stats = calibrated
    for objective in ("fisher", "loss"):
        for spectrum in solved(model, stats, "query_keys", objective).values():
            assert spectrum.errors.shape == (33,) and (spectrum.errors.diff() <= 0).all() and spectrum.errors[32] == 0
            assert spectrum.ranks(32) == [8] * 4 and sum(spectrum.ranks(11)) == 11
            kept = torch.cat([e[:r] for e, r in zip(spectrum.energies, spectrum.ranks(11), strict=True)])
            assert kept.min() >= spectrum.energies.flatten().sort(descending=True).values[11]
            with pytest.raises(InputError, match="width 33, expected 1 to 32"):
                spectrum.ranks(33)
    # Of directions given up one at a time, the cheapest half does less harm than the dearest.
    expected, harms = model(images).log_softmax(-1), {}
    for least in (True, False):
        small = copy.deepcopy(model)
        for spectrum in solved(model, stats, "query_keys").values():
            if not least:
                spectrum = replace(spectrum, P=spectrum.P.flip(2), Q=spectrum.Q.flip(1))
            narrow_query_keys(small, spectrum, 16)
        harms[least] = float((expected.exp() * (expected - small(images).log_softmax(-1))).sum(1).mean().detach())
    assert harms[True] < 0.5 * harms[False]


def test_joint_takes_them_where_it_can(calibrated, tiny_vit, images):
    model, stats = calibrated
    options = {"method": "joint", "rank_step": 4, "width_step": 8}
    plan = vitlr.plan(model, stats, "params:70%", **options)
    assert plan.attention == "query_keys" and "q·k" in str(plan) and "2 attentions narrowed" in str(plan)
    assert vitlr.plan(model, stats, "params:70%", attention="none", **options).attention is None
    assert vitlr.plan(model, stats, "params:70%", method="widths", width_step=8).attention is None
    plain = vitlr.calibrate(model, [images], objective="output", hidden=True)
    assert vitlr.plan(model, plain, "params:70%", **options).attention is None
    with pytest.raises(InputError, match="needs an objective of gradients"):
        vitlr.plan(model, plain, "params:70%", attention="query_keys", **options)
    bare = vitlr.calibrate(model, [images], hidden=False)
    with pytest.raises(InputError, match="no hidden moments"):
        vitlr.plan(model, bare, "params:70%", attention="query_keys", **options)
    normed = tiny_vit(qk_norm=True)
    stats = vitlr.calibrate(normed, [images], hidden=True)
    assert vitlr.plan(normed, stats, "params:70%", **options).attention is None
    with pytest.raises(
        InputError, match=r"directions of queries and keys could go.*k_norm stands.*without norms of q and k"
    ):
        vitlr.plan(normed, stats, "params:70%", attention="query_keys", **options)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("swinv2_tiny_window8_256", "does more to queries and keys"),
        ("swinv2_cr_tiny_ns_224", "does more to queries and keys"),
    ],
)
def test_attention_with_other_scores_keeps_them(name, reason):
    model, _ = make(name)
    refused = why_no_scores(model)
    assert set(refused) >= set(attentions(model)[0]) and reason in next(iter(refused.values()))


def test_bad_moments_name_the_attention(calibrated):
    model, stats = calibrated
    stats = copy.deepcopy(stats)
    layer = stats.layers["blocks.1.attn.qkv"]
    layer.score_moment[2, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"attention blocks\.1\.attn, head 2"):
        solved(model, stats, "query_keys")
    layer.score_moment = torch.zeros(4, 8, 7, dtype=torch.float64)
    with pytest.raises(InputError, match=r"score_moment is \[4, 8, 7\], expected"):
        layer.check_shapes()


def test_a_head_without_gradient_is_free(calibrated):
    model, stats = calibrated
    stats = copy.deepcopy(stats)
    layer = stats.layers["blocks.0.attn.qkv"]
    for key in ("score_gradient", "image_score_moment", "image_score_gradient"):
        getattr(layer, key)[1] = 0
    spectrum = solved(model, stats, "query_keys")["blocks.0.attn"]
    assert not spectrum.energies[1].any() and spectrum.energies[[0, 2, 3]].all() and SCALE > 0
    assert spectrum.ranks(24) == [8, 0, 8, 8]
    small = copy.deepcopy(model)
    narrow_query_keys(small, spectrum, 24)
    assert torch.isfinite(small(torch.randn(2, 3, 32, 32))).all()
