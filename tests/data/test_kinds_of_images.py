"""Images of all types and depths are read as what they show; a data set that is cut, or numbered otherwise, is told."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vitlr.data.decoding import eight_bits
from vitlr.data.loader import open_data
from vitlr.errors import InputError

RAMP = np.linspace(0, 65535, 48 * 48).reshape(48, 48)


def tensor_of(tiny_vit, folder):
    return torch.cat([images for images, _ in open_data(folder, tiny_vit())])


def saved(folder, values, mode, name):
    (folder / "a").mkdir(parents=True)
    image = Image.fromarray(values) if mode is None else Image.fromarray(values, mode)
    image.save(folder / "a" / name)
    return folder


WIDE = {
    "16 bits": (RAMP.astype(np.uint16), "x.png"),
    "32 bits, up to 65535": (RAMP.astype(np.int32), "x.tif"),
    "32 bits, up to 255": ((RAMP / 257).round().astype(np.int32), "x.tif"),
    "fractions up to 1": ((RAMP / 65535).astype(np.float32), "x.tiff"),
    "fractions up to 255": ((RAMP / 257).astype(np.float32), "x.tif"),
    "fractions up to 65535": (RAMP.astype(np.float32), "x.tif"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_greyscale_of_any_depth_shows_what_its_bytes_show(tiny_vit, tmp_path, kind):
    values, name = WIDE[kind]
    as_bytes = saved(tmp_path / "bytes", (RAMP / 257).round().astype(np.uint8), None, "x.png")
    expected = tensor_of(tiny_vit, as_bytes)
    found = tensor_of(tiny_vit, saved(tmp_path / "wide", values, None, name))
    assert expected.std() > 0.3 and (found - expected).abs().max() <= 2.01 / 255 / 0.5


def test_depths_that_do_not_say_what_is_white_are_left_out(tiny_vit, tmp_path, caplog):
    folder = saved(tmp_path / "wide", np.full((40, 40), 1e6, np.float32), None, "x.tif")
    Image.new("RGB", (40, 40)).save(folder / "a" / "y.png")
    assert len(tensor_of(tiny_vit, folder)) == 1
    assert "its pixels are from 1e+06 to 1e+06, expected 0 to 1, 255 or 65535" in caplog.text
    for values in (np.full((2, 2), -1.0, np.float32), np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match="its pixels are from"):
            eight_bits(Image.fromarray(values))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_all_types_of_images_are_listed(tiny_vit, tmp_path, image_tar, kind, caplog):
    import io

    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    files = {}
    for name in ("x.webp", "x.BMP", "x.gif", "x.tif", "x.tiff", "x.png", "x.jpg", "x.JPEG", "x.jfif"):
        buffer = io.BytesIO()
        kinds = {"tif": "TIFF", "jpg": "JPEG", "webp": "WEBP", "jfif": "JPEG"}
        ending = name.split(".")[1]
        pixels.save(buffer, kinds.get(ending, ending.upper()))
        files[f"a/{name}"] = buffer.getvalue()
    if kind == "tar":
        path = image_tar(classes=(), extra=files)
    else:
        path = tmp_path / "types"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        (path / "a" / "y.heic").write_bytes(b"")
    loader = open_data(path, tiny_vit())
    assert loader.images == 9 and len(next(iter(loader))[0]) == 9
    assert ("left out images of types that are not read: 1 .heic" in caplog.text) == (kind == "folder")
    from timm.data.readers.img_extensions import IMG_EXTENSIONS

    assert IMG_EXTENSIONS == (".png", ".jpg", ".jpeg")  # timm's own list, for everybody, is as it was


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_an_archive_that_is_cut_anywhere_is_refused(tiny_vit, image_tar, share):
    path = image_tar(images=4)
    content = path.read_bytes()
    assert open_data(path, tiny_vit()).images == 20
    path.write_bytes(content[: int(share * len(content.rstrip(b"\0")))])
    with pytest.raises(InputError, match=r"it is cut short, or no \.tar"):
        open_data(path, tiny_vit())
    blocks = len(content.rstrip(b"\0")) // 512
    path.write_bytes(content[: int(share * blocks) * 512])  # between two headers
    with pytest.raises(InputError, match=r"it is cut short, or no \.tar"):
        open_data(path, tiny_vit())


def test_an_archive_that_goes_on_behind_its_end_is_refused(tiny_vit, image_tar):
    """It is read up to the first block of zeros, and what follows would be missing without a word."""
    path = image_tar(images=4)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        hole = archive.getmembers()[9]
    begins, ends = hole.offset, hole.offset_data + 512 * -(-hole.size // 512)
    damaged = content[:begins] + b"\xff" * 512 + content[begins + 512 :]
    for found in (content[:begins] + bytes(ends - begins) + content[ends:], content + content, damaged):
        path.write_bytes(found)
        with pytest.raises(InputError, match=r"it ends at byte \d+ of \d+, and more follows"):
            open_data(path, tiny_vit())
    path.write_bytes(content[:begins] + bytes(2**21))  # what a broken download was to be
    with pytest.raises(InputError, match="and more follows"):
        open_data(path, tiny_vit())
    path.write_bytes(content + bytes(10240))
    assert open_data(path, tiny_vit()).images == 20


def test_classes_that_torchvision_would_number_otherwise_are_told(tiny_vit, image_folder, caplog):
    names = ("c1", "c2", "c10", "c20", "c3")
    open_data(image_folder(names), tiny_vit())
    assert not caplog.records  # no label counts
    open_data(image_folder(names, name="judged"), tiny_vit(), need_labels=True)
    assert "numbered as timm does (2 before 10); by letters, as torchvision does" in caplog.text
    assert "from 'c2' on" in caplog.text
    caplog.clear()
    open_data(image_folder(name="plain"), tiny_vit(), need_labels=True)
    order = {name: index for index, name in enumerate(sorted(names))}
    open_data(image_folder(names, name="mapped"), tiny_vit(), need_labels=True, class_map=order)
    assert not caplog.records


def test_a_few_calibration_images_are_told(tiny_vit, caplog):
    import vitlr

    vitlr.calibrate(tiny_vit(), [torch.randn(1, 3, 32, 32)], objective="output")
    assert "calibrated on 1 images: plan and predicted error fit these few" in caplog.text
    caplog.clear()
    vitlr.calibrate(tiny_vit(), [torch.randn(100, 3, 32, 32)], objective="output")
    assert not caplog.records
