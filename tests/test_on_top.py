"""PEFT and torchao on top of a compressed model: trained or quantised, written, and read again to the same answers."""

import pytest
import torch
from torch import nn

import vitlr
from vitlr.errors import InputError

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answer(model):
    return model(X)


@pytest.mark.parametrize("method", ["lowrank", "joint"])
def test_adapters_on_a_compressed_model_are_saved_apart_and_fit_the_file_again(method, tiny_vit, batches, tmp_path):
    peft = pytest.importorskip("peft")
    small = vitlr.compress(tiny_vit(), batches, "params:70%", method=method, rank_step=4)
    vitlr.save(small, tmp_path / "small.safetensors")
    before = answer(small)
    config = peft.LoraConfig(target_modules=["down", "up"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(vitlr.load(tmp_path / "small.safetensors"), config).eval()
    with pytest.raises(InputError):
        vitlr.save(adapted, tmp_path / "adapted.safetensors")
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(vitlr.load(tmp_path / "small.safetensors"), tmp_path / "adapter").eval()
    assert torch.equal(answer(again), answer(adapted)) and not torch.equal(answer(again), before)
    merged = again.merge_and_unload()
    vitlr.save(merged, tmp_path / "merged.safetensors")
    torch.testing.assert_close(answer(merged), answer(adapted), rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(vitlr.load(tmp_path / "merged.safetensors")), answer(merged))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("method", ["lowrank", "joint"])
def test_steps_of_32_fit_torchaos_groups_and_the_quantised_state_loads_into_the_file_again(
    bits, method, tiny_vit, batches, tmp_path
):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_vit(embed_dim=128, num_heads=2)
    small = vitlr.compress(model, batches, "params:70%", method=method, rank_step=32, width_step=32)
    layers = [module for module in small.blocks.modules() if isinstance(module, nn.Linear)]
    assert all(layer.in_features % 32 == 0 for layer in layers)
    assert any(layer.in_features not in (128, 512) for layer in layers)
    vitlr.save(small, tmp_path / "small.safetensors")
    if bits == "int4":
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    else:
        config = quantization.Int8WeightOnlyConfig()
    before = answer(small)
    quantization.quantize_(small, config)
    rounded = answer(small)
    plain = vitlr.load(tmp_path / "small.safetensors")  # what the codes stand for, as floats
    floats = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in small.state_dict().items()}
    plain.load_state_dict({key: value.float() for key, value in floats.items()})
    torch.testing.assert_close(rounded, answer(plain), rtol=1e-3, atol=1e-3)
    assert not torch.equal(rounded, before)
    with pytest.raises(InputError, match="no plain tensor"):
        vitlr.save(small, tmp_path / "rounded.safetensors")
    torch.save(small.state_dict(), tmp_path / "rounded.pt")
    again = vitlr.load(tmp_path / "small.safetensors")
    again.load_state_dict(torch.load(tmp_path / "rounded.pt", weights_only=False), assign=True)
    assert torch.equal(answer(again), rounded)
