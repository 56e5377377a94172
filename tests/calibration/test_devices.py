"""On a device that runs behind: calibration reads no value in its loop, so the host never waits for it."""

from __future__ import annotations

import pytest
import torch
from reads import Reads

from vitlr.calibration import hooks
from vitlr.calibration.loop import calibrate
from vitlr.calibration.others import Others
from vitlr.data.batches import for_model, on_device
from vitlr.errors import NumericalError
from vitlr.measuring import losses

ALL = {"objective": ("fisher", "loss", "normalized"), "extras": ("rounding", "row_gradient"), "hidden": "attention"}


@pytest.fixture
def as_elsewhere(monkeypatch):
    """The CPU taken for a device that one has to wait for."""
    for module in (hooks, losses):
        monkeypatch.setattr(module, "read_freely", lambda t: False)


def reads(model, batches) -> int:
    with Reads() as mode:
        calibrate(model, batches, **ALL)
    return mode.count


def test_no_batch_reads_a_value(tiny_vit, batches, as_elsewhere):
    model, more = tiny_vit(), [*batches, *batches, *batches]
    ends = len(more) - len(batches)  # what answers leave to other classes is read once all are there, one of each batch
    assert reads(model, more) - reads(model, batches) == ends


def test_on_the_cpu_batches_do_read_values(tiny_vit, batches):
    assert reads(tiny_vit(), [*batches, *batches]) - reads(tiny_vit(), batches) > len(batches)


def test_the_sums_are_the_same(tiny_vit, batches, monkeypatch, request):
    model = tiny_vit()
    expected = calibrate(model, batches, **ALL)
    request.getfixturevalue("as_elsewhere")
    found = calibrate(model, batches, **ALL)
    for name, layer in expected.layers.items():
        for key, tensor in layer.sums():
            torch.testing.assert_close(found.layers[name].sum(key), tensor, rtol=1e-6, atol=0, msg=f"{name} {key}")
    assert all(torch.equal(found.others[name], lost) for name, lost in expected.others.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [-120, -60, -30, 0, 30, 60, 120])
def test_sizes_left_on_the_device_are_those_that_are_read(monkeypatch, power, dtype):
    t = (torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).double() * 2.0**power).to(dtype)
    (expected, size), _ = hooks.unit(t), monkeypatch.setattr(hooks, "read_freely", lambda t: False)
    found, own = hooks.unit(t)
    assert float(own) == size and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_is_scaled_by_what_is_no_number(monkeypatch, value):
    monkeypatch.setattr(hooks, "read_freely", lambda t: False)
    found, size = hooks.unit(torch.full((3, 2), value))
    assert float(size) == 1.0 and torch.equal(found.isnan(), torch.full((3, 2), value).isnan())


def test_answers_that_are_no_numbers_are_found_in_the_end(tiny_vit, images, as_elsewhere):
    with pytest.raises(NumericalError, match="sums hold NaN or Inf"):
        calibrate(tiny_vit(), [images, torch.full_like(images, float("inf"))], objective="loss")


def test_images_are_told_apart_before_they_move(tiny_vit, images):
    model = tiny_vit().to("meta")
    given = for_model(model, (images.double(), torch.zeros(len(images))))
    assert given.device.type == "cpu" and given.dtype == torch.float32
    assert losses.image_seeds([given], 3) == losses.image_seeds([images.double().float()], 3)
    assert on_device(model, given).device.type == "meta"


def test_sums_of_other_matrices_stay_where_the_model_is(tiny_vit):
    others, sums = Others(tiny_vit(), ()), {}
    others.matrices = {name: torch.nn.Parameter(p.to("meta")) for name, p in others.matrices.items()}
    others.errors = {name: [E.to("meta") for E in errors] for name, errors in others.errors.items()}
    for _ in range(2):
        for p in others.matrices.values():
            p.grad = torch.ones_like(p)
        others.add(sums)
    assert sums and {found.device.type for found in sums.values()} == {"meta"}
