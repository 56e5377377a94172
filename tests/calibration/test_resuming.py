"""Calibration with a file: used where it fits, gone on from where it was cut short, refused otherwise."""

from __future__ import annotations

import pytest
import torch

import vitlr
from vitlr import InputError, Statistics
from vitlr.calibration.resuming import images_of


@pytest.fixture
def loader(images):
    return [(part, torch.zeros(len(part))) for part in images.split(2)]


def cut(loader, after):
    """The loader, until an interrupt comes after so many batches."""
    for index, batch in enumerate(loader):
        if index == after:
            raise KeyboardInterrupt
        yield batch


def test_a_run_cut_short_goes_on_to_the_same_sums(tiny_vit, loader, tmp_path):
    model, file = tiny_vit(), tmp_path / "s.safetensors"
    whole = vitlr.calibrate(model, loader, resume=tmp_path / "whole.safetensors", objective="loss")
    with pytest.raises(KeyboardInterrupt, match=r"4 images are in .*s\.safetensors, run the same command again"):
        vitlr.calibrate(model, cut(loader, 2), resume=file, objective="loss")
    assert not Statistics.load(file).notes["complete"] and Statistics.load(file).images == 4
    with pytest.raises(InputError, match=r"loader= is missing .*was cut short and needs the rest"):
        vitlr.calibrate(model, None, resume=file)
    with pytest.raises(InputError, match="ends within a batch"):
        vitlr.calibrate(model, [torch.cat([x for x, _ in loader])], resume=file)
    seen = []
    again = vitlr.calibrate(model, loader, resume=file, progress=lambda done, total: seen.append(done))
    assert seen[0] == 4 and seen[-1] == again.images == whole.images and again.notes["complete"]
    for name, layer in whole.layers.items():
        for key, tensor in layer.sums():
            assert torch.equal(tensor, again.layers[name].sum(key)), (name, key)
    assert (tmp_path / "whole.safetensors").read_bytes() == file.read_bytes()


def test_a_whole_file_is_used_without_an_image(tiny_vit, loader, tmp_path):
    model, file = tiny_vit(), tmp_path / "s.safetensors"
    first = vitlr.calibrate(model, loader, resume=file, samples=2)
    written = file.read_bytes()
    again = vitlr.calibrate(model, None, resume=file)
    assert again.samples == 2 and again.images == first.images and file.read_bytes() == written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 3}, "samples=1, not 3"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"objective": "fisher"}, "objective=loss, not fisher"),
        ({"options": vitlr.calibration.options.Calibration(samples=3)}, "samples=1, not 3"),
        ({"hidden": "attention"}, "no moments of value channels"),
        ({"extras": ["input_abs"]}, "hold no input_abs"),
        ({}, "of other layers"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_alone(tiny_vit, loader, tmp_path, options, said):
    model, file = tiny_vit(), tmp_path / "s.safetensors"
    vitlr.calibrate(model, loader, resume=file, objective="loss", include="mlp")
    written = file.read_bytes()
    given = {"include": "mlp", **options} if options else {}
    with pytest.raises(InputError, match=rf"{said}.*name another file, or remove this one"):
        vitlr.calibrate(model, loader, resume=file, **given)
    assert file.read_bytes() == written


def test_hidden_moments_are_measured_where_they_can_be_had(tiny_vit, loader):
    found = vitlr.calibrate(tiny_vit(), loader)
    assert found.extras == ("hidden",) and not found.notes
    none = vitlr.calibrate(tiny_vit(), loader, hidden_memory=1000)
    assert none.extras == () and "take 524,288 bytes, more than hidden_memory=1,000" in none.notes["no_hidden"]
    attention = vitlr.calibrate(tiny_vit(), loader, include="attn")
    assert attention.extras == () and "finds no MLP" in attention.notes["no_hidden"]
    assert vitlr.calibrate(tiny_vit(), loader, objective="normalized").extras == ()
    assert vitlr.calibrate(tiny_vit(), loader, hidden=False).extras == ()


def test_what_a_loader_calls_images_may_be_the_images(tiny_vit, images):
    """The bar asks how many there are; a loader that holds them under that name is no reason to fail."""

    class Holder(list):
        pass

    loader = Holder([images])
    loader.images = images
    assert images_of(loader) is None and vitlr.calibrate(tiny_vit(), loader).images == len(images)


def test_statistics_of_another_size_than_a_dynamic_model_was_made_for_are_used_again(tiny_vit, tmp_path):
    """What counts is what the loader gives; of one that can be read once only, what the file says."""
    model = tiny_vit(dynamic_img_size=True).eval()
    larger = [torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    file = tmp_path / "s.safetensors"
    first = vitlr.calibrate(model, larger, resume=file)
    again = vitlr.calibrate(model, larger, resume=file)
    assert again.input_shape == first.input_shape == (3, 48, 48) and again.images == 8
    smaller = [batch[..., :32, :32].contiguous() for batch in larger]
    with pytest.raises(InputError, match=r"of images \(3, 48, 48\), the loader gives \(3, 32, 32\)"):
        vitlr.calibrate(model, smaller, resume=file)
    assert vitlr.calibrate(model, torch.utils.data.DataLoader(torch.cat(larger), 4), resume=file).images == 8
