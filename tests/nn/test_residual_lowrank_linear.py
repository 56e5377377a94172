"""ResidualLowRankLinear: values, dtypes, copies, compilers, dispatch, cost, files."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from fake_kernels import fake_kernel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vitlr
from vitlr.anatomy import linears
from vitlr.checkpoint.structure import restructure, structure
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import count_bytes, count_params
from vitlr.nn import LowRankMLP, ResidualLowRankLinear
from vitlr.ops.layers.codes import FORMS
from vitlr.runtime.modules import swap

K, N, R, GROUP = 48, 36, 4, 16
OP = "lowrank_residual_linear"


def dense(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype).eval()


def layer(form="int8", bias=True, dtype=torch.float32):
    return ResidualLowRankLinear.from_linear(dense(bias, dtype), R, form, GROUP)


@pytest.mark.parametrize(("form", "error"), [("int8", 0.01), ("int4", 0.12), ("fp8", 0.04), ("blockdiag", 0.8)])
def test_it_approximates_and_multiplies_out(form, error):
    linear, low, x = dense(), layer(form), torch.randn(64, K)
    assert (low(x) - linear(x)).norm() < error * (linear(x) - linear.bias).norm()
    again = low.to_linear()
    assert type(again) is nn.Linear and not again.training and not low.training
    torch.testing.assert_close(again(x), low(x))
    with torch.no_grad():
        whole = low.up.weight @ low.down.weight + low.dense_residual()
    torch.testing.assert_close(again.weight.data, whole)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_gradients_and_state(form, tmp_path):
    low = layer(form)
    for rows in [(), (3,), (2, 5), (2, 3, 5), (0, 7)]:
        assert low(torch.randn(*rows, K)).shape == (*rows, N)
    x = torch.randn(3, K, requires_grad=True)
    low(x).sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in low.parameters())
    torch.save(low.state_dict(), tmp_path / "state.pt")
    twin = ResidualLowRankLinear(K, N, R, form, GROUP)
    assert torch.equal(twin.dense_residual(), torch.zeros(N, K))  # unfilled, R is zero
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    clone = copy.deepcopy(low)
    assert torch.equal(twin(x), low(x)) and torch.equal(clone(x), low(x))
    assert clone.codes.data_ptr() != low.codes.data_ptr()


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_codes_survive_every_dtype(form, dtype):
    low, x = layer(form), torch.randn(5, K)
    codes, y = low.codes.clone(), low(x)
    for move in (lambda m: m.to(dtype), lambda m: m.type(dtype) if dtype == torch.float64 else m.to(dtype=dtype)):
        moved = move(copy.deepcopy(low)) if dtype != torch.float64 else copy.deepcopy(low).double()
        assert torch.equal(moved.codes, codes) and moved.scale.dtype == dtype
        assert moved(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(moved(x.to(dtype)).float(), y, rtol=0, atol=0.05)
    assert torch.equal(copy.deepcopy(low).half().codes, codes)
    assert torch.equal(copy.deepcopy(low).bfloat16().codes, codes)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_exports_and_takes_autocast(form):
    low, x = layer(form), torch.randn(4, K)
    for kernel in (False, True):
        with fake_kernel(OP, lambda key, kernel=kernel: None if kernel else "not now") as calls:
            torch.compiler.reset()
            compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), low(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert compiled(x).dtype == low(x).dtype == torch.bfloat16
            assert bool(calls) == kernel
            calls.clear()
            program = torch.export.export(low, (x,))
            names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert names and all(name.startswith("aten.") for name in names)
            torch.testing.assert_close(program.module()(x), low(x))
            assert len(calls) == kernel


def test_the_kernel_runs_only_where_children_are_plain():
    low, x, keys = layer("int4"), torch.randn(2, 5, K), []
    with fake_kernel(OP, lambda key: keys.append(tuple(key))) as calls:
        y = low(x)
        assert len(calls) == 1
        assert keys[0] == (10, K, N, R, "int4", GROUP, True, torch.float32, torch.device("cpu"))
        handle = low.down.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(low(x), y)
        assert len(calls) == 1
        handle.remove()
        torch.func.vmap(low)(x)
        assert len(calls) == 1
        low.up = nn.Sequential(low.up)
        torch.testing.assert_close(low(x), y)
        assert len(calls) == 1
        with pytest.raises(InputError, match="`up` holds a Sequential"):
            low.to_linear()


def test_what_it_costs():
    low = layer("int4", dtype=torch.bfloat16)
    assert count_bytes(low) == N * K // 2 + 2 * (N * K // GROUP + R * (K + N) + N)
    assert count_params(low) == N * K + R * (K + N) + N
    blocks = layer("blockdiag", bias=False)
    assert count_params(blocks) == N * GROUP + R * (K + N) and count_bytes(blocks) == 4 * count_params(blocks)


def test_dtype_of_the_layer():
    low = ResidualLowRankLinear.from_linear(dense(), R, "int8", GROUP, dtype=torch.bfloat16)
    assert {t.dtype for t in low.state_dict().values()} == {torch.bfloat16, torch.int8}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), r"rank 0 does not fit .* 1\.\.36"),
        ((37,), r"rank 37 does not fit"),
        ((R, "int3"), "unknown form 'int3'"),
        ((R, "int8", 0), "group_size 0"),
        ((R, "blockdiag", 20), "no blocks of 20 columns fit R 36x48"),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    with pytest.raises(InputError, match=message):
        ResidualLowRankLinear.from_linear(dense(), *args)
    with pytest.raises(InputError, match=message):
        ResidualLowRankLinear(K, N, *args)


def test_what_has_no_factors():
    with pytest.raises(InputError, match="got Conv2d"):
        ResidualLowRankLinear.from_linear(nn.Conv2d(3, 4, 1), 1)
    broken = dense()
    broken.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        ResidualLowRankLinear.from_linear(broken, R)
    state = layer().state_dict()
    state["codes"] = state["codes"].float()
    with pytest.raises(InputError, match=r"codes is torch.float32, expected torch.int8"):
        layer().load_state_dict(state)


@pytest.fixture
def compressed(tiny_vit):
    model = tiny_vit().eval()
    for (name, linear), form in zip(list(linears.targets(model).items())[:4], FORMS, strict=True):
        swap(model, name, ResidualLowRankLinear.from_linear(linear, 4, form, 16))
    return model


def test_models_with_it(compressed, images):
    y = compressed(images)
    names = [name for name, m in compressed.named_modules() if isinstance(m, ResidualLowRankLinear)]
    assert len(names) == 4
    survey = linears.survey(compressed)
    listed = [*survey.targets, *survey.kept, *survey.hidden]
    assert not [name for name in listed if name.startswith(tuple(f"{n}." for n in names))]
    plain = vitlr.to_dense(compressed)
    assert not [m for m in plain.modules() if isinstance(m, ResidualLowRankLinear)]
    torch.testing.assert_close(plain(images), y, rtol=1e-4, atol=1e-4)
    assert "ResidualLowRankLinear" in LowRankMLP.why_not(compressed.blocks[0].mlp)


def test_files_load_in_a_fresh_process(compressed, images, tmp_path):
    vitlr.save(compressed, tmp_path / "model.safetensors")
    torch.save(images, tmp_path / "images.pt")
    code = """
import sys, torch, vitlr
model = vitlr.load(sys.argv[1] + "/model.safetensors")
torch.save(model(torch.load(sys.argv[1] + "/images.pt")), sys.argv[1] + "/logits.pt")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), compressed(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": "int3"}, "unknown form 'int3'"),
        ({"residual": ["int8"]}, "residual .*, expected text"),
        ({"residual": None}, "residual None, expected text"),
        ({"group_size": 0}, "group size 0, expected a form and 1 to"),
        ({"group_size": True}, "group_size True, expected a whole number"),
        ({"group_size": 10**30}, "group_size 10+, expected a whole number"),
        ({"group_size": 1.5}, "group_size 1.5, expected a whole number"),
        ({"residual": "blockdiag", "group_size": 7}, "no blocks of 7 columns"),
        ({"rank": 0}, "rank 0"),
    ],
)
def test_hostile_structures_are_refused(compressed, tiny_vit, change, message):
    described = structure(compressed)
    name = next(iter(described))
    described[name] = {**described[name], **change}
    with pytest.raises(InputError, match=message):
        restructure(tiny_vit(), described)


def test_hostile_codes_are_refused(compressed, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    vitlr.save(compressed, path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    name = next(key for key in tensors if key.endswith("codes") and tensors[key].dtype == torch.int8)
    tensors[name] = tensors[name].float()
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="digest"):
        vitlr.load(path)
    from vitlr.checkpoint import files

    monkeypatch.setattr(files, "_digest", lambda *args: "sha256:forged")
    vitlr.save(compressed, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"codes is torch.float32, expected torch.int8"):
        vitlr.load(path)
