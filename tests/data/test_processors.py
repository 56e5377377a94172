"""What image processors of transformers do is said in timm's words: the same pixels come out, or it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitlr.data import data_config
from vitlr.errors import InputError

transformers = pytest.importorskip("transformers")

HALF = [0.5] * 3


def made(processor, config):
    """One image as the processor makes it, and as the words do; no resizing, which Pillow and torch do otherwise."""
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = torch.as_tensor(processor(pixels, return_tensors="pt", do_resize=False)["pixel_values"][0])
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels / 255 - mean) / std, theirs


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViT", {}),
        ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
        ("ViT", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        ("ViT", {"do_normalize": False}),
        ("ViT", {"do_normalize": False, "do_rescale": False}),
        ("EfficientNet", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}),
        ("EfficientNet", {"include_top": False}),
        ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "image_mean": [0.0] * 3}),
    ],
)
def test_pixels_are_those_of_the_processor(kind, options):
    processor = getattr(transformers, f"{kind}ImageProcessor")(size={"height": 32, "width": 32}, **options)
    ours, theirs = made(processor, data_config(nn.Identity(), processor))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_one_number_stands_for_all_channels():
    processor = transformers.ViTImageProcessor(image_mean=0.5, image_std=0.25)
    config = data_config(nn.Identity(), processor)
    assert config["mean"] == (0.5,) * 3 and config["std"] == (0.25,) * 3


def test_levits_short_side_is_an_eighth_more_than_said():
    config = data_config(nn.Identity(), transformers.LevitImageProcessor())
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 224 / 256


@pytest.mark.parametrize(
    ("kind", "said"),
    [("MobileViT", "swaps red and blue"), ("Perceiver", r"cuts \(256, 256\) out of images of \(224, 224\)")],
)
def test_what_timms_transform_does_not_do_is_refused(kind, said):
    with pytest.raises(InputError, match=f"{kind}ImageProcessor {said}.*; give mean="):
        data_config(nn.Identity(), getattr(transformers, f"{kind}ImageProcessor")())


def test_timms_models_in_transformers_speak_for_themselves():
    architecture = "vit_tiny_patch16_224"
    model = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(architecture=architecture))
    config = data_config(model)
    assert config["input_size"] == (3, 224, 224) and config["mean"] == (0.5,) * 3 and config["crop_pct"] == 0.9
    import timm

    processor = transformers.TimmWrapperImageProcessor(timm.create_model(architecture).pretrained_cfg)
    assert data_config(nn.Identity(), processor) == config
