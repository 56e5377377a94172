"""Every family of timm at a tiny size: every target runs once made visible, and that leaves the function as it was."""

import pytest
import timm
import torch
from families import BLOCK, MODELS, make
from torch import nn

from vitlr.anatomy import linears, visibility


def fired(model: nn.Module, names: dict[str, nn.Linear], x: torch.Tensor) -> tuple[set[str], torch.Tensor]:
    seen: set[str] = set()
    hooks = [linear.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, linear in names.items()]
    with torch.no_grad():
        logits = model(x)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("name", MODELS)
def test_every_target_fires_once_visible_and_the_function_stays(name):
    _, count, past = MODELS[name]
    model, x = make(name)
    found = linears.targets(model)
    assert len(found) == count
    bypassed = visibility.bypassed(model)
    assert len(bypassed) == past and set(bypassed) <= set(found)

    seen, before = fired(model, found, x)
    assert set(found) - seen == set(bypassed)  # the adapter knows exactly what does not run

    with visibility.visible(model) as changed:
        seen, during = fired(model, found, x)
    assert set(changed) == set(bypassed) and seen == set(found)
    # fp64, because whether the bias is added before or after rounding depends on the BLAS and the shape
    assert (before - during).abs().max() <= 1e-12 and (past or torch.equal(before, during))
    assert set(visibility.bypassed(model)) == set(bypassed)  # put back as it was

    assert set(visibility.make_visible(model)) == set(bypassed)
    assert visibility.make_visible(model) == ()
    seen, after = fired(model, found, x)
    assert seen == set(found) and torch.equal(during, after)


@pytest.mark.parametrize("name", MODELS)
def test_only_images_feed_targets(name):
    """The input of every target depends on the image; tables, constant queries and classifiers are kept dense."""
    model, x = make(name)
    inputs: dict[str, list[torch.Tensor]] = {}
    found = linears.targets(model)
    for key, linear in found.items():
        linear.register_forward_hook(lambda _, args, __, key=key: inputs.setdefault(key, []).append(args[0].clone()))
    with torch.no_grad(), visibility.visible(model):
        model(x)
        model(x + 1)
    assert set(inputs) == set(found)
    assert all(not torch.equal(*pair) for pair in inputs.values())
    every = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert every == set(found) | set(linears.kept(model)) and not linears.hidden(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("swin_tiny_patch4_window7_224", ("head.fc",)),
        ("convnext_tiny", ("head.fc",)),
    ],
)
def test_classifiers_are_named_by_timm(name, expected):
    model, _ = make(name)
    assert linears.classifier_names(model) == expected
    assert linears.classifier_names(nn.ModuleDict({"encoder": model})) == tuple(f"encoder.{n}" for n in expected)


def test_a_model_without_classifier_has_none():
    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1, embed_dim=32, num_heads=2)
    assert linears.classifier_names(model) == ()


def test_the_switch_is_put_back_after_an_error():
    model, _ = make("beit_base_patch16_224")
    model.blocks[0].attn.qkv_bias_separate = True
    with pytest.raises(KeyError), visibility.visible(model) as changed:
        assert changed == ("blocks.1.attn.qkv",)
        raise KeyError
    assert [b.attn.qkv_bias_separate for b in model.blocks] == [True, False]


def test_what_is_compressed_already_is_no_target_again():
    from vitlr.nn import LowRankLinear

    model, _ = make("vit_tiny_patch16_224")
    model.blocks[0].mlp.fc1 = LowRankLinear.from_linear(model.blocks[0].mlp.fc1, 4)
    names = set(linears.targets(model))
    assert len(names) == 2 * BLOCK - 1 and not any("blocks.0.mlp.fc1" in name for name in names)
    assert not any("down" in name or "up" in name for name in linears.kept(model) | linears.hidden(model))
