"""LowRankGLU: taken where it is exact, refused elsewhere, given back whole, saved and loaded."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from fake_kernels import fake_kernel
from timm.layers import GluMlp, Mlp, QuickGELU, SwiGLU, SwiGLUPacked
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vitlr
from vitlr.checkpoint import files
from vitlr.errors import InputError
from vitlr.nn import LowRankGLU, LowRankLinear, LowRankMLP
from vitlr.surgery import fusion

K, D = 12, 20
MAKERS = {"split": SwiGLU, "packed": SwiGLUPacked, "gate last": GluMlp}


def mlp(kind="split", low=None, **args):
    torch.manual_seed(0)
    module = MAKERS[kind](K, D, **args) if isinstance(kind, str) else kind(K, D, **args)
    for name in ("fc1_g", "fc1_x", "fc1", "fc2") if low is None else low:
        if hasattr(module, name):
            setattr(module, name, LowRankLinear.from_linear(getattr(module, name), 5))
    return module.eval()


@pytest.mark.parametrize("low", [None, ("fc1", "fc1_g", "fc1_x"), ("fc2",)], ids=["all", "first", "second"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_function_with_and_without_a_kernel(kind, low):
    module, x = mlp(kind, low), torch.randn(2, 7, K)
    fused = LowRankGLU(module)
    assert torch.equal(fused(x), module(x))
    with fake_kernel("lowrank_glu") as calls:
        torch.testing.assert_close(fused(x), module(x))
        assert len(calls) == 1
        low_first, low_second = low != ("fc2",), low is None or low == ("fc2",)
        assert (calls[0][2] is not None, calls[0][8] is not None) == (low_first, low_second)


@pytest.mark.parametrize("kind", MAKERS)
def test_without_biases(kind):
    module, x = mlp(kind, bias=False), torch.randn(2, K)
    with fake_kernel("lowrank_glu") as calls:
        torch.testing.assert_close(LowRankGLU(module)(x), module(x))
        assert len(calls) == 1


def test_the_key_describes_the_call():
    keys = []
    with fake_kernel("lowrank_glu", lambda key: keys.append(key)):
        for kind in MAKERS:
            LowRankGLU(mlp(kind))(torch.randn(2, 7, K))
    hidden = {"split": D, "packed": D // 2, "gate last": D // 2}
    acts = {"split": "silu", "packed": "silu", "gate last": "sigmoid"}
    assert [tuple(key)[:9] for key in keys] == [
        (14, K, hidden[kind], K, 5, 5, 5, kind != "split", acts[kind]) for kind in MAKERS
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_keys_stay_and_the_original_comes_back_with_the_weights_of_now(kind):
    module, x = mlp(kind), torch.randn(3, K)
    fused = LowRankGLU(module)
    assert list(fused.state_dict()) == list(module.state_dict())
    fused = copy.deepcopy(fused)
    with torch.no_grad():
        fused.fc2.up.weight.mul_(2)
    back = fused.back()
    assert type(back) is type(module)
    assert [name for name, _ in back.named_children()] == [name for name, _ in module.named_children()]
    assert torch.equal(back(x), fused(x)) and not torch.equal(back(x), module(x))
    assert not any(child.training for child in back.modules())


class Residual(SwiGLU):
    def forward(self, x):
        return x + super().forward(x)


class Ungated(SwiGLU):
    def forward(self, x):
        return self.fc2(self.act(self.fc1_g(x)) * self.fc1_g(x))


class Branching(SwiGLU):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Swapped(SwiGLU):
    def forward(self, x):
        return self.fc2(self.fc1_g(x) * self.act(self.fc1_x(x)))


class Rows(GluMlp):
    """Takes the first two rows of fc1's output, not the halves of its columns."""

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h[0]) * h[1])


class Masked(SwiGLU):
    def forward(self, x, mask=None):
        return super().forward(x)


def hooked():
    module = mlp()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mlp(low=()), "none of fc1_g, fc1_x, fc2 is low-rank"),
        (lambda: mlp(act_layer=QuickGELU), "activation QuickGELU is none of"),
        (lambda: mlp(drop=0.1), "drop1 Dropout"),
        (lambda: mlp(norm_layer=nn.LayerNorm), "norm LayerNorm"),
        (lambda: mlp("packed", norm_layer=nn.LayerNorm), "norm LayerNorm"),
        (lambda: mlp(Residual), "its forward is"),
        (lambda: mlp(Ungated), "its forward is fc2(act(fc1_g(x)) * fc1_g(x))"),
        (lambda: mlp(Swapped), "its forward is fc2(act(fc1_x(x)) * fc1_g(x))"),
        (lambda: mlp(Branching), "cannot be traced"),
        (lambda: mlp(Rows), "getitem>(fc1(x), 1) * act("),
        (lambda: mlp(Masked), "its forward is x, mask -> fc2("),
        (lambda: mlp(Mlp), "its forward is fc2(act(fc1(x)))"),
        (lambda: mlp("packed", use_conv=True, low=()), "fc1 is a Conv2d"),
        (lambda: LowRankGLU(mlp()), "it is one already"),
        (lambda: nn.GELU(), "it has no fc1, act, fc2"),
        (hooked, "it has hooks"),
    ],
)
def test_what_would_not_be_the_same_is_refused(make, reason):
    module = make()
    assert reason in LowRankGLU.why_not(module)
    with pytest.raises(InputError, match="cannot become a LowRankGLU"):
        LowRankGLU(module)


INTRUSIONS = {
    "hook on the gate": lambda m: m.fc1_g.register_forward_hook(lambda *_: None),
    "hook on the activation": lambda m: m.act.register_forward_hook(lambda *_: None),
    "hook on a factor": lambda m: m.fc2.up.register_forward_hook(lambda *_: None),
    "another layer": lambda m: setattr(m, "fc1_x", nn.Sequential(m.fc1_x)),
    "another activation": lambda m: setattr(m, "act", QuickGELU()),
}


@pytest.mark.parametrize("name", INTRUSIONS)
def test_children_that_are_not_plain_are_called(name):
    fused, x = LowRankGLU(mlp()), torch.randn(3, K)
    with fake_kernel("lowrank_glu") as calls:
        fused(x)
        INTRUSIONS[name](fused)
        assert torch.equal(fused(x), fused.fc2(fused.act(fused.fc1_g(x)) * fused.fc1_x(x)))
        assert len(calls) == 1


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_and_autocast(kind, kernel):
    module, x = mlp(kind), torch.randn(3, K)
    fused = LowRankGLU(copy.deepcopy(module))
    with fake_kernel("lowrank_glu", lambda key: None if kernel else "not now") as calls:
        got = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
        want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(got, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        assert len(calls) == 2 * kernel


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_compiles_as_one_graph(kind, kernel):
    fused = LowRankGLU(mlp(kind))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    with fake_kernel("lowrank_glu", lambda key: None if kernel else "not now") as calls:
        for rows in (2, 5, 197):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), fused(x))
        assert counter.frame_count == 1 and len(calls) == 6 * kernel


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MAKERS)
def test_exports_scripts_and_traces_as_plain_linears(kind):
    fused, x = LowRankGLU(mlp(kind)), torch.randn(4, K)
    expected = mlp(kind)(x)
    with fake_kernel("lowrank_glu") as calls, fake_kernel("lowrank_linear") as more:
        program = torch.export.export(fused, (x,))
        for module in (torch.jit.script(fused), torch.jit.trace(fused, x, check_trace=False), program.module()):
            torch.testing.assert_close(module(x), expected)
        assert not calls and not more
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.linear.default") == (6 if kind == "split" else 4)


def vit(name):
    args = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "img_size": 28}
    if name == "swiglu packed":
        return timm.models.VisionTransformer(patch_size=14, mlp_layer=partial(SwiGLUPacked), **args)
    return timm.create_model(name, **args)


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "vit_giant_patch14_dinov2", "swiglu packed"])
def test_a_whole_model_is_fused_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 28, 28)
    model = vit(name).eval()
    for block in model.blocks:
        if name == "eva02_base_patch14_224":
            block.mlp.norm = nn.Identity()
        for layer in ("fc1", "fc1_g", "fc1_x", "fc2"):
            if hasattr(block.mlp, layer):
                setattr(block.mlp, layer, LowRankLinear.from_linear(getattr(block.mlp, layer), 6))
    fused = vitlr.fuse(model, fold=False)  # tests/test_folding.py folds
    assert {"blocks.0.mlp", "blocks.1.mlp"} <= set(fusion.fused_names(fused))
    assert all(type(block.mlp) is LowRankGLU for block in fused.blocks)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x)) and torch.equal(fusion.unfuse(fused)(x), model(x))
    files.save(fused, tmp_path / "m.safetensors", model_args=False)
    dense = vit(name)
    if name == "eva02_base_patch14_224":
        for block in dense.blocks:
            block.mlp.norm = nn.Identity()
    loaded = files.load(tmp_path / "m.safetensors", model=dense)
    assert fusion.fused_names(loaded) == fusion.fused_names(fused)
    with torch.no_grad():
        assert torch.equal(loaded(x), fused(x))


def test_a_fused_model_of_timms_registry_rebuilds_itself(tmp_path):
    args = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "img_size": 28}
    model = vitlr.create_model("vit_giant_patch14_dinov2", **args).eval()
    for block in model.blocks:
        block.mlp.fc1 = LowRankLinear.from_linear(block.mlp.fc1, 6)
    fused, x = vitlr.fuse(model), torch.randn(2, 3, 28, 28)
    files.save(fused, tmp_path / "m.safetensors")
    loaded = files.load(tmp_path / "m.safetensors")
    assert all(type(block.mlp) is LowRankGLU for block in loaded.blocks)
    with torch.no_grad():
        assert torch.equal(loaded(x), fused(x))


def test_plain_mlps_are_none_of_its_business():
    module = mlp(Mlp)
    assert LowRankMLP.why_not(module) is None and type(fusion.fused(module)) is LowRankMLP
    with pytest.raises(InputError, match=r"no LowRankMLP: .*; no LowRankGLU: "):
        fusion.fused(nn.GELU())
