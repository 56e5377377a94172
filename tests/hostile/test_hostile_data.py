"""Images, archives and class maps that lie: no program runs, nothing waits, nothing large is decoded."""

import io
import logging
import os
import random
import struct
import tarfile
import zlib

import pytest
from mutations import Tally
from PIL import Image

import vitlr.calibration.loop
from vitlr.checkpoint.weight_files import state_dicts
from vitlr.data.loader import open_data
from vitlr.errors import InputError


def png(width, height, rows=None):
    """A PNG that says it is so large; its rows are zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezer, body = zlib.compressobj(9), b""
    for _ in range(height if rows is None else rows):
        body += squeezer.compress(b"\0" * (3 * width + 1))
    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", body + squeezer.flush()) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"


def in_format(name):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 60)).save(file, name)
    return file.getvalue()


def skipped(folder, model, caplog):
    """What is said of the files that were skipped."""
    loader = open_data(folder, model, workers=0)
    with caplog.at_level(logging.WARNING):
        read = sum(len(labels) for _, labels in loader)
    return read, loader.skipped, caplog.text


def test_no_file_makes_pillow_run_a_program(tiny_vit, image_folder, caplog, monkeypatch):
    folder = image_folder()
    (folder / "a" / "0.jpg").write_bytes(EPS)
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program runs"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("a program runs"))
    assert skipped(folder, tiny_vit(), caplog)[:2] == (9, 1)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_another_common_format_are_read_whatever_they_are_called(tiny_vit, image_folder, caplog, form):
    folder = image_folder()
    (folder / "a" / "0.jpg").write_bytes(in_format(form))
    assert skipped(folder, tiny_vit(), caplog)[:2] == (10, 0)


@pytest.mark.parametrize("size", [(13_000, 13_000), (30_000, 1000), (60_000, 60_000), (1, 60_000)])
def test_a_small_file_with_many_pixels_is_not_decoded(tiny_vit, image_folder, caplog, size):
    folder, tally = image_folder(), Tally()
    (folder / "a" / "0.jpg").write_bytes(png(*size, rows=min(size[1], 1000)))
    tally("bomb", lambda: list(open_data(folder, tiny_vit(), workers=0)))
    tally.check()
    read, left, said = skipped(folder, tiny_vit(), caplog)
    assert (read, left) == (9, 1) and "pixels" in said


def test_an_ordinary_photograph_of_20_million_pixels_is_read(tiny_vit, image_folder, caplog):
    folder = image_folder()
    noise = Image.effect_noise((1000, 800), 60).resize((5200, 3900)).convert("RGB")
    noise.save(folder / "a" / "0.jpg", quality=90)
    assert skipped(folder, tiny_vit(), caplog)[:2] == (10, 0)


def test_a_pipe_or_device_called_jpg_is_skipped_and_not_waited_for(tiny_vit, image_folder, caplog):
    folder = image_folder()
    (folder / "a" / "0.jpg").unlink()
    os.mkfifo(folder / "a" / "0.jpg")
    (folder / "b" / "0.jpg").unlink()
    (folder / "b" / "0.jpg").symlink_to("/dev/zero")
    read, left, said = skipped(folder, tiny_vit(), caplog)
    assert (read, left) == (8, 2) and "no regular file" in said


@pytest.mark.parametrize("size", [10**12, -1024])
@pytest.mark.parametrize("name", ["a/huge.jpg", "a/huge.txt", "inner.tar"])
def test_members_of_an_archive_that_claim_what_cannot_be_are_refused(tiny_vit, tmp_path, jpeg, size, name):
    member, tally = tarfile.TarInfo(name), Tally()
    member.size = size
    good = tarfile.TarInfo("a/0.jpg")
    good.size = len(jpeg(0))
    content = good.tobuf() + jpeg(0) + bytes(-good.size % 512) + member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    (tmp_path / "x.tar").write_bytes(content)
    tally("claims", lambda: open_data(tmp_path / "x.tar", tiny_vit(), workers=0))
    tally.check()
    assert tally.refused == 1


def test_compressed_archives_pipes_and_devices_are_refused_at_once(tiny_vit, image_tar, tmp_path):
    plain, model = image_tar(), tiny_vit()
    for mode in ("w:gz", "w:bz2", "w:xz"):
        with tarfile.open(tmp_path / "packed.tar", mode) as tar:
            tar.add(plain, "x.tar")
        with pytest.raises(InputError, match="it is compressed; unpack it"):
            open_data(tmp_path / "packed.tar", model)
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    for name in ("pipe.tar", "zero.tar"):
        with pytest.raises(InputError, match="cannot read"):
            open_data(tmp_path / name, model)


def test_class_maps_and_checkpoints_that_have_no_end_are_refused(tiny_vit, image_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match="cannot read class map"):
            open_data(image_folder(name=f"of_{os.path.basename(path)}"), tiny_vit(), class_map=path)
        with pytest.raises(InputError, match="cannot read checkpoint"):
            state_dicts(path)


def test_images_damaged_at_random_are_read_or_skipped(tiny_vit, image_folder, jpeg):
    rng, tally, model = random.Random(5), Tally(), tiny_vit()
    whole = [jpeg(1), *map(in_format, ("PNG", "GIF", "WEBP", "TIFF", "BMP"))]
    folder = image_folder(("a",), 60)
    for _ in range(10):
        for path in folder.rglob("*.jpg"):
            content = bytearray(rng.choice(whole))
            for _ in range(rng.randint(1, 8)):
                content[rng.randrange(min(len(content), 400))] = rng.randrange(256)
            path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)
        tally("a folder", lambda: list(open_data(folder, model, workers=0)))
    tally.faults = [fault for fault in tally.faults if " s" not in fault]  # sixty files a try
    tally.check()


def test_archives_damaged_at_random_are_read_or_refused(tiny_vit, image_tar, tmp_path):
    rng, tally, model = random.Random(6), Tally(), tiny_vit()
    path, content = tmp_path / "damaged.tar", image_tar().read_bytes()
    for i in range(150):
        data = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            start = 512 * rng.randrange(len(data) // 512)
            data[start + rng.randrange(512)] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        tally(str(i), lambda: list(open_data(path, model, workers=0)))
    tally.check()


def test_statistics_are_not_taken_for_those_of_another_data_set_of_the_same_name(
    tiny_vit, image_folder, tmp_path, jpeg, caplog
):
    model, stats = tiny_vit(), tmp_path / "s.safetensors"
    folder = image_folder()
    vitlr.calibration.loop.calibrate(model, open_data(folder, model, workers=0), resume=stats, objective="output")
    again = vitlr.calibration.loop.calibrate(model, open_data(folder, model, workers=0), resume=stats)
    assert again.images == 10
    (folder / "a" / "0.jpg").write_bytes(jpeg(77, (50, 50)))
    with pytest.raises(InputError, match="of another folder: its files have other names or sizes"):
        vitlr.calibration.loop.calibrate(model, open_data(folder, model, workers=0), resume=stats)
    del again.notes["listing"]  # as an earlier version wrote them
    again.save(stats)
    with caplog.at_level(logging.WARNING, "vitlr"):
        found = vitlr.calibration.loop.calibrate(model, open_data(folder, model, workers=0), resume=stats)
    assert found.images == 10 and "by name and number only" in caplog.text
