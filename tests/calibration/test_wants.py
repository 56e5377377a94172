"""What calibration will sum is known in bytes before any image is, and refused where it is too much."""

import pytest

import vitlr
from vitlr.calibration.options import Calibration
from vitlr.errors import InputError
from vitlr.runtime.sizes import read_bytes, said_bytes

KINDS = [
    {"objective": "fisher", "hidden": True},
    {"objective": "fisher", "hidden": False},
    {"objective": ("loss", "output"), "hidden": True},
    {"objective": "fisher", "hidden": "attention", "extras": ("rounding", "ranges")},
    {"objective": "output", "hidden": False, "extras": ("input_moment", "row_gradient")},
]


def taken(stats):
    return sum(tensor.nbytes for layer in stats.layers.values() for _, tensor in layer.own())


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_the_bytes_told_are_those_taken(tiny_vit, batches, how):
    model = tiny_vit()
    size = taken(vitlr.calibrate(model, batches, **how))
    assert taken(vitlr.calibrate(model, batches, max_memory=size, **how)) == size
    with pytest.raises(InputError, match=r"the sums of 8 layers take .*, more than max_memory="):
        vitlr.calibrate(model, batches, max_memory=size - 1, **how)


def test_it_is_refused_before_the_second_batch_and_what_would_fit_is_said(tiny_vit, batches):
    model, seen = tiny_vit(), []

    def images():
        for batch in batches:
            seen.append(batch)
            yield batch

    with pytest.raises(InputError) as refused:
        vitlr.calibrate(model, images(), objective="fisher", hidden=True, max_memory="330kB")
    assert len(seen) == 1
    message = str(refused.value)
    assert "take 438 kB, more than max_memory=330kB; objective=loss (" in message
    assert "hidden=False, which method=lowrank has, (" in message and "both of them (" in message
    for how in ({"objective": "loss", "hidden": True}, {"objective": "fisher", "hidden": False}):
        size = taken(vitlr.calibrate(model, batches, max_memory="330kB", **how))
        assert f"({said_bytes(size)})" in message
    with pytest.raises(InputError, match=r"nothing less would \(at least 7\d\.\d kB\); leave layers out with exclude="):
        vitlr.calibrate(model, batches, objective="fisher", hidden=True, max_memory=1000)


def test_sums_in_a_file_take_no_memory(tiny_vit, batches, tmp_path):
    how = {"objective": "fisher", "hidden": True, "max_memory": "45kB"}
    with pytest.raises(InputError, match=r"leave layers out with exclude=; sums_in= keeps them in a file"):
        vitlr.calibrate(tiny_vit(), batches, **how)
    assert taken(vitlr.calibrate(tiny_vit(), batches, **how, sums_in=str(tmp_path))) > 400e3


def test_sizes_are_read_as_they_are_written():
    assert read_bytes("2GB", "x") == 2e9 and read_bytes("1.5 GiB", "x") == 1.5 * 2**30 and read_bytes(7, "x") == 7
    assert [said_bytes(n) for n in (12, 3e3, 4.56e6, 2e9)] == ["12 bytes", "3 kB", "4.56 MB", "2 GB"]
    for bad in ("", "GB", "-1GB", "0", "2 apples", "nan", "1e999"):
        with pytest.raises(InputError, match=r"max_memory=.*expected bytes above 0, as in 2GB"):
            Calibration(max_memory=bad)
