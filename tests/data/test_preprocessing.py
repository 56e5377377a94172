"""How images are made for a model: by what it says of itself, through wrappers, as given, and never by a guess."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitlr.data import data_config, open_data
from vitlr.errors import InputError

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture
def known(tiny_vit):
    """A model whose description is nobody's default."""
    model = tiny_vit(num_classes=5)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD, "crop_pct": 0.8}
    return model


class Lightning(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.loss, self.net = nn.CrossEntropyLoss(), model

    def forward(self, x):
        return self.net(x)


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "a module that holds it": Lightning,
    "a module that holds a compiled one": lambda model: Lightning(torch.compile(model, backend="eager")),
    "a sequence that begins with it": lambda model: nn.Sequential(model, nn.Linear(5, 2)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(known, wrapper):
    assert data_config(WRAPPERS[wrapper](known)) == data_config(known)
    assert data_config(known)["mean"] == MEAN and data_config(known)["crop_pct"] == 0.8


def test_a_model_that_gets_other_images_than_its_wrapper_does_not_describe_them(known):
    class Normalised(Lightning):
        def forward(self, x):
            return self.net((x - 0.5) / 0.5)

    for wrapped in (Normalised(known), nn.Sequential(nn.BatchNorm2d(3), known)):
        with pytest.raises(InputError, match=r"may change the images before (net|1) .*give mean=, std="):
            data_config(wrapped)
        assert data_config(wrapped, mean=0.5, std=0.25, img_size=48)["input_size"] == (3, 48, 48)


def test_what_nothing_describes_is_asked_for(image_folder):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    with pytest.raises(InputError, match="nothing says with which input_size and mean and std Sequential was trained"):
        open_data(image_folder(), plain)
    loader = open_data(image_folder(name="given"), plain, mean="0.5", std=[0.1, 0.2, 0.4], img_size=32)
    assert loader.config["mean"] == (0.5,) * 3 and loader.config["std"] == (0.1, 0.2, 0.4)
    assert next(iter(loader))[0].shape == (10, 3, 32, 32)
    assert "images as 3x32x32, mean 0.5, 0.5, 0.5, std 0.1, 0.2, 0.4, crop 1, bicubic (as given)" in repr(loader)


def test_what_is_given_comes_before_what_the_model_says(known, caplog, image_folder):
    with caplog.at_level("INFO", "vitlr"):
        loader = open_data(image_folder(), known, std=0.25, interpolation="bilinear", crop_pct=1.0)
    assert loader.config["mean"] == MEAN and loader.config["std"] == (0.25,) * 3
    assert loader.config["interpolation"] == "bilinear"
    assert "(as timm says; std, crop_pct, interpolation as given)" in caplog.text
    as_mapping = data_config(known, {"std": 0.25, "interpolation": "bilinear", "crop_pct": 1.0})
    assert as_mapping == loader.config
    for wrong, message in (({"mean": "a"}, "mean='a', expected a number"), ({"std": 0}, "above 0")):
        with pytest.raises(InputError, match=message):
            data_config(known, **wrong)
    with pytest.raises(InputError, match="data_config= has 'means', expected some of input_size, mean"):
        data_config(known, {"means": 0})
    with pytest.raises(InputError, match="data_config= is a float"):
        data_config(known, 0.5)


def test_presets_of_torchvision_are_read():
    from torchvision.transforms._presets import ImageClassification

    config = data_config(nn.Linear(2, 2), ImageClassification(crop_size=24, resize_size=32, mean=MEAN, std=STD))
    assert config["input_size"] == (3, 24, 24) and config["crop_pct"] == 0.75
    assert (config["mean"], config["std"], config["interpolation"]) == (MEAN, STD, "bilinear")


def transformers_vit(folder=None, **config):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, **config)).eval()
    if folder is not None:
        model.save_pretrained(folder)
        size = {"height": config["image_size"], "width": config["image_size"]}
        transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD, size=size, resample=3).save_pretrained(folder)
        model = type(model).from_pretrained(folder).eval()
    return model


def test_the_image_processor_beside_transformers_weights_is_read(tmp_path, image_folder):
    model = transformers_vit(tmp_path / "weights", image_size=32, num_labels=5)
    loader = open_data(image_folder(), model, need_labels=True)
    assert loader.config["mean"] == MEAN and loader.config["std"] == STD
    assert loader.config["input_size"] == (3, 32, 32) and "as the image processor of" in loader.made
    import transformers
    from PIL import Image

    file = loader.dataset.reader.filename(loader.dataset.chosen[0][0], absolute=True)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "weights")
    expected = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert (next(iter(loader))[0][0] - expected).abs().max() < 0.1  # resized by Pillow here, by torch there


def test_transformers_config_gives_the_size_and_no_mean():
    model = transformers_vit(image_size=48, num_channels=1)
    with pytest.raises(InputError, match="nothing says with which mean and std ViTForImageClassification was trained"):
        data_config(model)
    config = data_config(model, mean=0.5, std=0.5)
    assert config["input_size"] == (1, 48, 48) and config["mean"] == (0.5,)


def test_classes_are_counted_in_the_answer_not_where_they_are_said(tiny_vit, image_folder):
    def assigned(classes):
        model = tiny_vit(num_classes=7)
        model.head = nn.Linear(32, classes)  # num_classes stays 7
        return model.eval()

    folder = image_folder()
    assert open_data(folder, assigned(5), need_labels=True).images == 10
    for model in (nn.DataParallel(tiny_vit(num_classes=7)), nn.Sequential(tiny_vit(num_classes=0), nn.Linear(32, 7))):
        with pytest.raises(InputError, match="has 5 classes, the model has 7"):
            open_data(folder, model, need_labels=True)
