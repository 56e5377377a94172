"""What calibration refuses: images, loaders and models of which the sums would say something wrong."""

import pytest
import torch
from torch import nn

from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError, NumericalError


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "accuracy"}, "objective"),
        ({"objective": ()}, "objective"),
        ({"extras": ("everything",)}, "extra"),
        ({"samples": 0}, "samples"),
        ({"samples": 2, "loss_fn": lambda out, batch: out.sum()}, "samples=2"),
        ({"include": "("}, "include"),
    ],
)
def test_bad_arguments_are_refused(tiny_vit, images, options, message):
    with pytest.raises(InputError, match=message):
        calibrate(tiny_vit(), [images], **options)


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 3, 32, 32)], ["text"], [3], [torch.tensor(1.0)]])
def test_loaders_without_images_are_refused(tiny_vit, loader):
    with pytest.raises(InputError, match="loader"):
        calibrate(tiny_vit(), loader)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(3, 32, 32), torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 32, 32),
     (torch.zeros(2), torch.zeros(2, 3, 32, 32)), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)],
)  # fmt: skip
def test_images_that_the_model_cannot_take_are_refused(tiny_vit, batch):
    with pytest.raises(InputError, match="the model cannot take an image of the loader"):
        calibrate(tiny_vit(), [batch])
    with pytest.raises(InputError, match="loader is one tensor"):
        calibrate(tiny_vit(), torch.zeros(2, 3, 32, 32))


def test_a_model_whose_answer_is_constant_is_refused(tiny_vit, images):
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(InputError, match="no gradient reached"):
        calibrate(model, [images])
    calibrate(model, [images], objective="output")


def test_nan_in_images_or_weights_is_an_error(tiny_vit, images):
    bad = images.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError):
        calibrate(tiny_vit(), [bad])
    with pytest.raises(NumericalError, match=r"blocks\.0"):
        calibrate(tiny_vit(), [bad], objective="output")


def test_other_runs_are_not_added_up(tiny_vit, images):
    one = calibrate(tiny_vit(), [images])
    for other in (
        calibrate(tiny_vit(seed=1), [images]),
        calibrate(tiny_vit(), [images], objective="output"),
        calibrate(tiny_vit(), [images], seed=1),
        calibrate(tiny_vit(), [images], exclude="fc1"),
    ):
        with pytest.raises(InputError, match="do not belong together"):
            one.merge(other)


class Frozen(nn.Module):
    """A backbone behind no_grad, as in a linear probe, and a head."""

    def __init__(self, everything=False):
        super().__init__()
        self.backbone, self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.everything, self.num_classes = everything, 5

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
            if self.everything:
                x = self.neck(x)
        if not self.everything:
            x = self.neck(x)
        return self.head(x).detach() if self.everything else self.head(x)


def test_layers_that_no_gradient_reaches_are_named():
    with pytest.raises(InputError, match=r"no gradient arrives at 1 layers \(backbone\)"):
        calibrate(Frozen(), [torch.randn(4, 8)])
    calibrate(Frozen(), [torch.randn(4, 8)], exclude="backbone")
    with pytest.raises(InputError, match="autograd"):
        calibrate(Frozen(everything=True), [torch.randn(4, 8)])


def test_images_of_two_sizes_are_refused(tiny_vit):
    model = tiny_vit(dynamic_img_size=True)
    with pytest.raises(InputError, match="after images of"):
        calibrate(model, [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)])


def test_a_failed_batch_spoils_the_statistics_it_was_added_to(tiny_vit, images, tmp_path):
    stats = calibrate(tiny_vit(), [images])
    bad = images.clone()
    bad[0] = float("nan")
    with pytest.raises(NumericalError):
        calibrate(tiny_vit(), [bad], stats=stats)
    for use in (
        lambda: stats.save(tmp_path / "s.safetensors"),
        lambda: stats.merge(stats),
        lambda: stats.check_fits({}),
        lambda: calibrate(tiny_vit(), [images], stats=stats),
    ):
        with pytest.raises(InputError, match="half a batch"):
            use()


def test_damaged_shapes_in_a_file_are_refused(tiny_vit, images, tmp_path):
    stats = calibrate(tiny_vit(), [images], objective="output")
    stats.layers["blocks.0.mlp.fc2"].moment = torch.zeros(3, 3, dtype=torch.float64)
    stats.save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"moment is \[3, 3\]"):
        Statistics.load(tmp_path / "s.safetensors")


def test_sequence_first_layers_are_weighted_by_image_as_images_first_ones_are():
    class Either(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.a, self.b, self.first = nn.Linear(4, 4), nn.Linear(4, 3), first

        def forward(self, x):
            seen = self.a(x.transpose(0, 1)).transpose(0, 1) if self.first else self.a(x)
            return self.b(seen).mean(1)

    x = torch.randn(2, 4, 4)  # as many rows for two images as a batch of tokens would have
    for objective in ("normalized", "fisher"):
        models = [Either(first) for first in (True, False)]
        models[1].load_state_dict(models[0].state_dict())
        sums = [calibrate(model, [x], objective=objective).layers["a"].held for model in models]
        assert sums[0].keys() == sums[1].keys()
        for key, total in sums[1].items():
            torch.testing.assert_close(sums[0][key], total, rtol=1e-5, atol=1e-6)


def test_layers_that_mix_images_cannot_be_weighted_by_image():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(torch.cat([x, x[:1]]))[:-1]).mean(1)

    x = torch.randn(3, 2, 4)
    calibrate(Mixing(), [x], objective="loss")
    for objective in ("normalized", "fisher"):
        with pytest.raises(InputError, match=r"layer a .* use objective='loss' or 'output'"):
            calibrate(Mixing(), [x], objective=objective)


def test_inputs_that_a_loader_gives_no_names_of_are_asked_for_by_name(tiny_vit, images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.more = tiny_vit(), nn.Linear(3, 5)

        def forward(self, image, more):
            return self.vit(image) + self.more(more)

    more = torch.randn(len(images), 3)
    with pytest.raises(InputError, match="several inputs come as dicts, under the names"):
        calibrate(Two().eval(), [(images, more)])
    assert calibrate(Two().eval(), [{"image": images, "more": more}]).images == len(images)
