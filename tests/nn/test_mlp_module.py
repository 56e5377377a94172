"""LowRankMLP: taken where it is exact, refused elsewhere, and given back whole."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_kernels import fake_kernel
from timm.layers import GELU, GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, LowRankMLP

K, D = 12, 20


def mlp(low=("fc1", "fc2"), act_layer=nn.GELU, cls=Mlp, **args):
    torch.manual_seed(0)
    module = cls(K, D, act_layer=act_layer, **args)
    for name in low:
        setattr(module, name, LowRankLinear.from_linear(getattr(module, name), 5))
    return module.eval()


def tanh_gelu():
    return nn.GELU(approximate="tanh")


@pytest.mark.parametrize("act_layer", [nn.GELU, tanh_gelu, GELU, GELUTanh, nn.SiLU, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("low", [("fc1", "fc2"), ("fc1",), ("fc2",)], ids=str)
def test_the_same_function_with_and_without_a_kernel(low, act_layer):
    module, x = mlp(low, act_layer), torch.randn(2, 7, K)
    fused = LowRankMLP(module)
    assert torch.equal(fused(x), module(x))
    with fake_kernel("lowrank_mlp") as calls:
        assert torch.equal(fused(x), module(x))
        assert len(calls) == 1
        assert (calls[0][2] is None, calls[0][5] is None) == ("fc1" not in low, "fc2" not in low)


def test_without_biases():
    module, x = mlp(bias=False), torch.randn(2, K)
    with fake_kernel("lowrank_mlp") as calls:
        assert torch.equal(LowRankMLP(module)(x), module(x)) and len(calls) == 1


def test_keys_stay_and_the_original_comes_back_with_the_weights_of_now():
    module, x = mlp(), torch.randn(3, K)
    module.note = "kept"
    fused = LowRankMLP(module)
    assert list(fused.state_dict()) == list(module.state_dict())
    assert isinstance(module.fc1, LowRankLinear)  # the original is not taken apart
    fused = copy.deepcopy(fused)  # what surgery does
    with torch.no_grad():
        fused.fc1.up.weight.mul_(2)
    back = fused.back()
    assert type(back) is Mlp and back.note == "kept"
    assert [name for name, _ in back.named_children()] == [name for name, _ in module.named_children()]
    assert torch.equal(back(x), fused(x)) and not torch.equal(back(x), module(x))
    assert LowRankMLP.why_not(back) is None
    assert not any(child.training for child in back.modules())
    fused.train()
    assert all(child.training for child in fused.back().modules())


def test_moves_and_casts_reach_what_comes_back():
    fused = LowRankMLP(mlp()).to(torch.bfloat16)
    assert {p.dtype for p in fused.back().parameters()} == {torch.bfloat16}
    assert len(list(fused.modules())) == 1 + 3 + 3 + 1  # itself, two layers and their children, the activation


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Twice(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.act(self.fc1(x))))


class Backwards(nn.Module):
    def __init__(self, *_, act_layer):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(K, K), act_layer(), nn.Linear(K, K)

    def forward(self, x):
        return self.fc1(self.act(self.fc2(x)))


class Branching(Mlp):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Masked(Mlp):
    def forward(self, x, mask=None):
        return super().forward(x)


class Extra(Mlp):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(1))


def hooked():
    module = mlp()
    module.register_forward_hook(lambda *_: None)
    return module


def adapted():
    module = mlp()
    module.fc1 = nn.Sequential(module.fc1)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mlp(()), "none of fc1, fc2 is low-rank"),
        (lambda: mlp(act_layer=QuickGELU), "activation QuickGELU is none of"),
        (lambda: mlp(act_layer=nn.PReLU), "activation PReLU"),
        (lambda: mlp(drop=0.1), "drop1 Dropout"),
        (lambda: mlp(norm_layer=nn.LayerNorm), "norm LayerNorm"),
        (lambda: mlp((), cls=GluMlp, act_layer=nn.SiLU), "none of fc1, fc2 is low-rank"),
        (lambda: SwiGLU(K, D), "it has no fc1"),
        (lambda: nn.GELU(), "it has no fc1, act, fc2"),
        (lambda: mlp(cls=Residual), "more than fc1, act, fc2 in a row"),
        (lambda: mlp(cls=Twice), "runs fc1, act, act, fc2"),
        (lambda: mlp(cls=Backwards), "runs fc2, act, fc1"),
        (lambda: mlp(cls=Branching), "cannot be traced"),
        (lambda: mlp(cls=Masked), "more than fc1, act, fc2 in a row"),
        (lambda: mlp(cls=Extra), "parameters of its own: scale"),
        (lambda: mlp(use_conv=True, low=()), "fc1 is a Conv2d"),
        (lambda: LowRankMLP(mlp()), "it is one already"),
        (hooked, "it has hooks"),
        (adapted, "fc1 is a Sequential"),
    ],
)
def test_what_would_not_be_the_same_is_refused(make, reason):
    module = make()
    assert reason in LowRankMLP.why_not(module)
    with pytest.raises(InputError, match="cannot become a LowRankMLP"):
        LowRankMLP(module)


def test_the_decision_needs_no_data():
    with torch.device("meta"):
        module = Mlp(K, D)
        module.fc1 = LowRankLinear(K, D, 5)
    assert LowRankMLP.why_not(module) is None
    assert LowRankMLP(module)(torch.empty(2, K, device="meta")).shape == (2, K)


INTRUSIONS = {
    "hook on fc1": lambda m: m.fc1.register_forward_hook(lambda *_: None),
    "hook on the activation": lambda m: m.act.register_forward_hook(lambda *_: None),
    "hook on a factor": lambda m: m.fc2.up.register_forward_hook(lambda *_: None),
    "another layer": lambda m: setattr(m, "fc1", nn.Sequential(m.fc1)),
    "another activation": lambda m: setattr(m, "act", QuickGELU()),
}


@pytest.mark.parametrize("name", INTRUSIONS)
def test_children_that_are_not_plain_are_called(name):
    fused, x = LowRankMLP(mlp()), torch.randn(3, K)
    with fake_kernel("lowrank_mlp") as calls:
        fused(x)
        INTRUSIONS[name](fused)
        assert torch.equal(fused(x), fused.fc2(fused.act(fused.fc1(x))))
        assert len(calls) == 1


def test_without_a_kernel_of_its_own_the_layers_use_theirs():
    fused = LowRankMLP(mlp())
    with fake_kernel("lowrank_linear") as calls:
        fused(torch.randn(3, K))
    assert len(calls) == 2


def test_the_key_describes_the_call():
    keys = []
    with fake_kernel("lowrank_mlp", lambda key: keys.append(key)):
        LowRankMLP(mlp(("fc2",), GELUTanh))(torch.randn(2, 7, K))
    assert [tuple(key) for key in keys] == [
        (14, K, D, K, None, 5, "gelu_tanh", False, torch.float32, torch.device("cpu")),
    ]


@pytest.mark.parametrize("kernel", [False, True])
def test_gradients_and_autocast(kernel):
    module, x = mlp(), torch.randn(3, K)
    fused = LowRankMLP(copy.deepcopy(module))
    with fake_kernel("lowrank_mlp", lambda key: None if kernel else "not now") as calls:
        got = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
        want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(got, want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fused(x), module(x)) and fused(x).dtype == torch.bfloat16
        assert len(calls) == 3 * kernel


@pytest.mark.parametrize("act_layer", [nn.GELU, GELUTanh])
@pytest.mark.parametrize("kernel", [False, True])
def test_compiles_as_one_graph(kernel, act_layer):
    fused = LowRankMLP(mlp(act_layer=act_layer))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    with fake_kernel("lowrank_mlp", lambda key: None if kernel else "not now") as calls:
        for rows in (2, 5, 197):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), fused(x))
        assert counter.frame_count == 1 and len(calls) == 6 * kernel


def test_compiles_with_inductor():
    fused, x = LowRankMLP(mlp()), torch.randn(4, K)
    # In this process: starting a pool of compilers takes longer than everything else.
    with fake_kernel("lowrank_mlp") as calls, torch._inductor.config.patch(compile_threads=1):
        torch.testing.assert_close(torch.compile(fused, fullgraph=True)(x), fused(x))
        assert len(calls) == 2


def test_exports_as_plain_linears():
    fused, x = LowRankMLP(mlp()), torch.randn(4, K)
    with fake_kernel("lowrank_mlp") as calls, fake_kernel("lowrank_linear") as more:
        program = torch.export.export(fused, (x,))
        assert not calls and not more
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "linear" in target] == ["aten.linear.default"] * 4
    torch.testing.assert_close(program.module()(x), fused(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripts_and_traces_as_plain_linears():
    fused, x = LowRankMLP(mlp(("fc1",))), torch.randn(4, K)
    with fake_kernel("lowrank_mlp") as calls, fake_kernel("lowrank_linear") as more:
        for module in (torch.jit.script(fused), torch.jit.trace(fused, x, check_trace=False)):
            torch.testing.assert_close(module(x), fused.fc2(fused.act(fused.fc1.up(fused.fc1.down(x)))))
        assert not calls and not more


def test_what_comes_back_shares_no_hooks_with_the_original():
    module = mlp()
    fused, seen = LowRankMLP(module), []
    module.register_forward_hook(lambda *_: seen.append(1))
    fused.back()(torch.randn(2, K))
    assert not seen
