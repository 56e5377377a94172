"""Value channels and heads of attention: what goes changes nothing but what it gave, and its loss is predicted."""

import copy

import pytest
import torch
from families import MODELS, make
from solved import solved
from torch import nn

import vitlr
from vitlr.anatomy.attention import attentions, fewer_heads
from vitlr.errors import InputError, NumericalError
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.ops.linalg.elimination import compensate, eliminate, eliminate_alone, eliminate_groups
from vitlr.runtime.modules import swap
from vitlr.surgery.attention import narrow_attention

FAMILIES = [  # plain, rotary, biases apart, q, k and v apart, windows with cosines, attention pooling beside it
    "vit_tiny_patch16_224", "vit_base_patch16_rope_reg1_gap_256", "eva_giant_patch14_224", "eva02_base_patch14_224",
    "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224",
    "vit_base_patch16_siglip_224",
]  # fmt: skip


def masked(model: nn.Module, keeps: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What the model returns with all other channels of what the projections read set to zero."""
    handles = []
    for name, keep in keeps.items():
        mask = torch.zeros(attentions(model)[0][name].width, dtype=images.dtype)
        mask[keep] = 1
        output = model.get_submodule(attentions(model)[0][name].output)
        handles.append(output.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


def ragged(width: int, heads: int) -> torch.Tensor:
    """Every third channel of the first head, none of the last where there are three, all of the others but one."""
    each = width // heads
    return torch.cat([torch.arange(0, each, 3), torch.arange(each, width - each * (heads > 2))[1:]])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", [None, 6])
def test_the_kept_channels_compute_what_they_did(name, rank):
    model, images = make(name)
    vitlr.anatomy.visibility.make_visible(model)
    found = attentions(model)[0]
    if rank:
        for attention in found.values():
            for linear in attention.linears:
                swap(model, linear, LowRankLinear.from_linear(model.get_submodule(linear), rank))
    for whole in (False, True):
        keeps = {n: torch.arange(a.head_dim, a.width) if whole else ragged(a.width, a.heads) for n, a in found.items()}
        keeps = {n: keep for n, keep in keeps.items() if len(keep)}  # one head of Swin's first stage is all it has
        expected, small = masked(model, keeps, images), copy.deepcopy(model)
        for attention, keep in keeps.items():
            narrow_attention(small, found[attention], keep)
        assert torch.allclose(small(images), expected, rtol=0, atol=1e-11)
        for attention, keep in keeps.items():
            a = found[attention]
            v, output = small.get_submodule(a.value), small.get_submodule(a.output)
            inner = output.linear if isinstance(output, SelectedLinear) else output
            assert inner.in_features == len(keep)
            rows = (v.linear if isinstance(v, SelectedLinear) else v).out_features
            others = 2 * (len(keep) if whole else a.width) if len(a.inputs) == 1 else 0
            assert rows == others + len(keep)


@torch.no_grad()
def test_whole_heads_leave_a_smaller_attention_of_plain_linears(tiny_vit, images):
    model = tiny_vit(num_heads=4)
    attention = attentions(model)[0]["blocks.0.attn"]
    keep = torch.cat([torch.arange(8), torch.arange(16, 32)])
    expected = masked(model, {attention.name: keep}, images)
    narrow_attention(model, attention, keep)
    module = model.blocks[0].attn
    assert type(module.qkv) is nn.Linear is type(module.proj) and module.qkv.weight.shape == (72, 32)
    assert (module.num_heads, module.head_dim, module.attn_dim) == (3, 8, 24)
    assert torch.allclose(model(images), expected, atol=1e-6)
    assert torch.allclose(vitlr.fuse(model)(images), expected, atol=1e-5)
    left = attentions(model)[0][attention.name]
    assert (left.heads, left.width) == (3, 24) and fewer_heads(model) == {attention.name: (3, 4)}
    narrow_attention(model, left, torch.arange(8, 16))  # and once more
    assert fewer_heads(model) == {attention.name: (1, 4)} and module.qkv.weight.shape == (24, 32)


def test_bad_channels_and_weights_are_refused_and_nothing_changes(tiny_vit):
    model = tiny_vit()
    attention = attentions(model)[0]["blocks.1.attn"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for keep in ([], [3, 2], [1, 1], [-1, 2], [0, 32]):
        with pytest.raises(InputError, match=r"blocks\.1\.attn: expected increasing channels from 0 to 31"):
            narrow_attention(model, attention, torch.tensor(keep, dtype=torch.int64))
    with pytest.raises(InputError, match=r"proj: weight is \[32, 32\], expected \[32, 4\]"):
        narrow_attention(model, attention, torch.arange(4), weight=torch.zeros(32, 32))
    model.blocks[1].attn.proj = vitlr.ResidualLowRankLinear(32, 32, 4)
    with pytest.raises(InputError, match=r"proj is a ResidualLowRankLinear"):
        narrow_attention(model, attention, torch.arange(4))
    assert torch.equal(model.blocks[1].attn.qkv.weight, before["blocks.1.attn.qkv.weight"])
    assert not fewer_heads(model)


@pytest.mark.parametrize("size", [1, 4])
def test_groups_go_together_each_time_the_cheapest(size):
    D, N = 12, 5
    H = torch.randn(300, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64)
    W, R = torch.randn(N, D, dtype=torch.float64), torch.randn(N, N, dtype=torch.float64)
    M = H.mT @ H

    def loss(keep: torch.Tensor) -> float:
        delta = H @ W.mT - H[:, keep] @ compensate(W, M, keep).mT
        return float((delta @ R.mT).square().sum())

    order, errors = eliminate_groups(M, R @ W, size)
    if size == 1:
        single = eliminate(M, R @ W)
        assert torch.equal(order, single[0]) and torch.allclose(errors, single[1], rtol=1e-9)
    for width in range(size, D, size):
        assert float(errors[width]) == pytest.approx(loss(order[:width]), rel=1e-8)
        groups = order[: width + size].view(-1, size)
        tries = [loss(torch.cat([*groups[:g], *groups[g + 1 :]])) for g in range(len(groups))]
        assert min(tries) == pytest.approx(float(errors[width]), rel=1e-8)
        assert (groups // size == groups[:, :1] // size).all()  # neighbours
    alone, lost = eliminate_alone(M, R @ W, size)
    gone = alone[2 * size :]
    assert float(lost[2 * size]) == pytest.approx(float((H[:, gone] @ W[:, gone].mT @ R.mT).square().sum()), rel=1e-8)


def calibrated(name: str, **options) -> tuple[nn.Module, list, vitlr.Statistics]:
    model, _ = make(name)
    size = MODELS[name][0]["img_size"]
    batches = [(torch.randn(4, 3, size, size, dtype=torch.float64),) for _ in range(2)]
    return model, batches, vitlr.calibrate(model, batches, hidden="attention", **options)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_base_patch14_224"])
@pytest.mark.parametrize("grain", ["channels", "heads"])
@pytest.mark.parametrize("objective", ["loss", "output"])
def test_the_predicted_loss_is_the_measured_one(name, grain, objective):
    """`Σ δᵀ F δ` over all tokens, and the ridge's own part."""
    with torch.enable_grad():
        model, batches, stats = calibrated(name, objective=objective)
    vitlr.anatomy.visibility.make_visible(model)
    spectrum = solved(model, stats, grain, ridge=1e-4)["blocks.0.attn"]
    seen = []
    proj = model.get_submodule(spectrum.second)
    handle = proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    for (images,) in batches:
        model(images)
    handle.remove()
    o = torch.cat(seen)
    for width in (16,) if grain == "heads" else (1, 16, 31):
        V, bias = spectrum.weights(width)
        keep = spectrum.keep(width)
        delta = proj(o) - o[:, keep] @ V.mT - bias
        moved = proj.weight.detach().clone()
        moved[:, keep] -= V
        measured = float(((delta @ spectrum.metric) * delta).sum()) / stats.images
        level = spectrum.moments.covariance().diagonal().mean() / (1 + spectrum.moments.ridge)
        measured += spectrum.moments.ridge * float(level) * float(((spectrum.metric @ moved) * moved).sum())
        assert float(spectrum.errors[width]) == pytest.approx(measured, rel=1e-7)
        narrow = copy.deepcopy(model)
        narrow_attention(narrow, spectrum.attention, keep, weight=V, bias=bias)
        got = []
        narrow.get_submodule(spectrum.second).register_forward_hook(lambda m, args, y, got=got: got.append(y))
        for (images,) in batches:
            narrow(images)
        assert torch.allclose(torch.cat([y.flatten(0, -2) for y in got]), proj(o) - delta, rtol=1e-9, atol=1e-9)


def test_moments_are_asked_for_saved_and_missed_by_name(tiny_vit, batches, tmp_path):
    model = tiny_vit()
    stats = vitlr.calibrate(model, batches, hidden="attention")
    assert stats.extras == ("hidden", "values")
    having = {name for name, layer in stats.layers.items() if layer.input_moment is not None}
    assert having == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.proj", "mlp.fc2")}
    stats.save(tmp_path / "s.safetensors")
    read = vitlr.Statistics.load(tmp_path / "s.safetensors")
    a, b = (solved(model, s, "channels")["blocks.1.attn"] for s in (stats, read))
    assert torch.equal(a.errors, b.errors) and torch.equal(a.order, b.order)
    plain = vitlr.calibrate(model, batches, hidden=True)
    with pytest.raises(InputError, match=r"no moments of value channels \(blocks\.0\.attn\).*hidden='attention'"):
        vitlr.plan(model, plain, "params:80%", method="widths", attention="heads")
    with pytest.raises(InputError, match="2 MLPs and 2 attentions take 557,056 bytes"):
        vitlr.calibrate(model, batches, hidden="attention", hidden_memory=1000)
    with pytest.raises(InputError, match="hidden='heads', expected True"):
        vitlr.calibrate(model, batches, hidden="heads")
    stats.layers["blocks.1.attn.proj"].input_moment[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"attention blocks\.1\.attn"):
        solved(model, stats, "heads")


class Grouped(nn.Module):
    """Attention with half as many keys and values as queries, by timm's names."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers.attention import AttentionRope

        self.attn = AttentionRope(32, 4, qkv_fused=False, num_kv_heads=2)
        self.mlp = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.attn(x.flatten(2).mT[:, :5, :1].expand(-1, -1, 32)))


def test_what_cannot_lose_channels_is_named_with_the_reason(tiny_vit, batches):
    for model, why in (
        (Grouped(), r"attn: its heads share keys and values .*Supported: timm's ViT"),
        (tiny_vit(scale_attn_norm=True), "a norm over its heads makes every channel depend on all"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 3)), "no attention whose value"),
    ):
        with pytest.raises(InputError, match=why):
            vitlr.calibrate(model, batches, hidden="attention")
    with pytest.raises(InputError, match=r"attn\.proj is not among the layers that are measured"):
        vitlr.calibrate(tiny_vit(), batches, hidden="attention", exclude="attn.proj")
