"""From files to batches: order, classes, corrupt files, and what is refused."""

from __future__ import annotations

import io
import itertools
import os
import sys
import tarfile
import zlib

import pytest
import torch
from PIL import Image

from vitlr.data.loader import open_data, spread
from vitlr.data.preprocessing import data_config
from vitlr.data.readers import open_reader
from vitlr.errors import InputError

CLASSES = ("a", "b", "c", "d", "e")


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_is_what_timm_reads_in_another_order(tiny_vit, image_folder, image_tar, kind):
    from timm.data import create_dataset, create_transform

    model = tiny_vit()
    path = image_folder() if kind == "folder" else image_tar()
    timm_set = create_dataset("", root=str(path), transform=create_transform(**data_config(model)))
    loader = open_data(path, model, batch_size=4, need_labels=True)
    images, labels = everything(loader)
    order = spread(10)
    assert (len(loader), loader.images, loader.skipped) == (3, 10, 0)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    for position, index in enumerate(order):
        expected, label = timm_set[index]
        assert torch.equal(images[position], expected) and labels[position] == label


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_worker_processes_change_nothing(tiny_vit, image_folder, image_tar, kind):
    path = image_folder() if kind == "folder" else image_tar()
    bad = path / "a" / "0.jpg"
    if kind == "folder":
        bad.write_bytes(b"no image")
    alone, two = (open_data(path, tiny_vit(), batch_size=3, workers=n) for n in (0, 2))
    before = torch.get_rng_state()
    (x, a), (y, b) = everything(alone), everything(two)
    assert torch.equal(x, y) and torch.equal(a, b)
    assert alone.skipped == two.skipped == (kind == "folder")
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = everything(two)
    assert torch.equal(again, y)


def test_spread_is_a_permutation_and_even():
    for count in (1, 2, 7, 1000):
        assert sorted(spread(count)) == list(range(count))
    order = spread(1000)
    for start in (0, 137, 500):
        stretch = sorted(order[start : start + 50])
        gaps = [b - a for a, b in itertools.pairwise(stretch)]
        assert max(gaps) <= 55  # 20 on average; a random sample of 50 has gaps near 90


def test_skip_and_limit_are_stretches_of_the_same_order(tiny_vit, image_folder):
    path = image_folder(images=4)
    images, labels = everything(open_data(path, tiny_vit()))
    first = everything(open_data(path, tiny_vit(), limit=7))
    rest = everything(open_data(path, tiny_vit(), skip=7))
    middle = everything(open_data(path, tiny_vit(), skip=3, limit=5, batch_size=2))
    assert torch.equal(torch.cat([first[0], rest[0]]), images)
    assert torch.equal(middle[0], images[3:8]) and torch.equal(middle[1], labels[3:8])
    assert set(everything(open_data(path, tiny_vit(), limit=5))[1].tolist()) == set(range(5))


def test_order_does_not_depend_on_how_the_system_lists_a_folder(tiny_vit, tmp_path, jpeg, monkeypatch):
    for seed, name in enumerate(("a1", "a01")):  # equal in timm's natural order
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.jpg").write_bytes(jpeg(seed))
    one = everything(open_data(tmp_path / "data", tiny_vit()))
    listed = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: reversed(list(listed(*args, **options))))
    two = everything(open_data(tmp_path / "data", tiny_vit()))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert open_reader(str(tmp_path / "data"), "validation")[2] == {"a01": 0, "a1": 1}  # not as a set is hashed


def test_large_tars_leave_no_pickle_beside_them(tiny_vit, image_tar, monkeypatch):
    path = image_tar()
    monkeypatch.setattr("os.path.getsize", lambda path: 11 * 2**30)  # timm caches its index from 10 GB on
    open_data(path, tiny_vit())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _png_bomb() -> bytes:
    """A PNG of 400 bytes that claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    side = (60000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _strip() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60000, 1)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_corrupt_files_are_skipped_counted_and_named_once(tiny_vit, image_folder, image_tar, jpeg, caplog, kind):
    whole = jpeg(9)
    bad = {
        "a/bad0.jpg": b"",
        "b/bad1.jpg": b"this is text",
        "c/bad2.jpg": whole[: len(whole) // 2],
        "d/bad3.png": _png_bomb(),
        "e/bad4.png": _strip() if kind == "folder" else whole[:30],
    }
    if kind == "folder":
        path = image_folder()
        for name, content in bad.items():
            (path / name).write_bytes(content)
    else:
        path = image_tar(extra=bad)
    clean = everything(open_data(image_folder(name="clean"), tiny_vit()))
    model = tiny_vit(img_size=64) if kind == "folder" else tiny_vit()
    loader = open_data(path, model, batch_size=4)
    for _ in range(2):
        images, labels = everything(loader)
        assert len(images) == 10 and sorted(labels.tolist()) == sorted(clean[1].tolist())
        assert (loader.images, loader.skipped) == (15, 5)
    assert len(caplog.records) == 1
    line = caplog.text
    assert "skipped 5 of 15 images" in line and line.count(".jpg (") + line.count(".png (") == 3 and "bad" in line
    if kind == "tar":  # timm's reader would have given a neighbour's pixels under the wrong name
        assert {x.sum().item() for x in images} == {x.sum().item() for x in clean[0]}


def test_all_corrupt_is_an_error(tiny_vit, image_folder):
    path = image_folder()
    for file in path.glob("*/*.jpg"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 10 images"):
        everything(open_data(path, tiny_vit()))


def test_missing_empty_and_foreign_paths(tiny_vit, tmp_path, image_tar):
    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "empty.tar", "w").close()
    (tmp_path / "text.tar").write_bytes(b"no archive" * 200)
    (tmp_path / "file.jpg").write_bytes(b"x")
    whole = image_tar(name="whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 - 100])
    for name, said in {
        "nowhere": "no data at",
        "empty": "there are none",
        "empty.tar": "there are none",
        "text.tar": "cannot read images",
        "cut.tar": "cannot read images",
        "file.jpg": r"expected a folder of images, a \.tar",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            open_data(tmp_path / name, tiny_vit())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"limit": 0}, {"skip": -1}, {"workers": -1}, {"skip": 10}])
def test_numbers_that_make_no_sense(tiny_vit, image_folder, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        open_data(image_folder(), tiny_vit(), **wrong)


def test_class_map_orders_the_labels(tiny_vit, image_folder, tmp_path):
    class_map = tmp_path / "classes.txt"
    class_map.write_text("e\nd\nc\nb\na\n\n")
    path = image_folder()
    _, native = everything(open_data(path, tiny_vit()))
    _, mapped = everything(open_data(path, tiny_vit(), class_map=class_map, need_labels=True))
    _, given = everything(open_data(path, tiny_vit(), class_map={c: 4 - i for i, c in enumerate(CLASSES)}))
    assert torch.equal(mapped, 4 - native) and torch.equal(given, mapped)


def test_folders_outside_the_class_map_are_left_out_and_reported(tiny_vit, image_folder, tmp_path, caplog):
    class_map = tmp_path / "classes.txt"
    class_map.write_text("a\nb\nc\nx\ny\n")
    loader = open_data(image_folder(), tiny_vit(), class_map=class_map, need_labels=True)
    assert loader.images == 6
    assert set(everything(loader)[1].tolist()) == {0, 1, 2}
    assert "left out 4 images of 2 folders that the class map does not name: d, e" in caplog.text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("a\nb\nc\nd\n", "has 4 classes, the model 5"),
        ("a\nb\nc\nd\na\n", "names 'a' twice"),
        ("u\nv\nw\nx\ny\n", "names none of the 5 folders"),
        ("", "has 0 classes"),
    ],
)
def test_class_map_that_does_not_fit(tiny_vit, image_folder, tmp_path, lines, said):
    class_map = tmp_path / "classes.txt"
    class_map.write_text(lines)
    with pytest.raises(InputError, match=said):
        open_data(image_folder(), tiny_vit(), class_map=class_map)


def test_class_map_that_is_no_text(tiny_vit, image_folder, tmp_path):
    (tmp_path / "binary.pkl").write_bytes(b"\x80\x04\x95\xff")
    for name in ("binary.pkl", "nowhere.txt"):
        with pytest.raises(InputError, match="cannot read class map"):
            open_data(image_folder(name=name[:3]), tiny_vit(), class_map=tmp_path / name)
    with pytest.raises(InputError, match="outside"):
        open_data(image_folder(), tiny_vit(), class_map=dict.fromkeys(CLASSES, 5))


def test_labels_must_be_the_models_where_they_are_needed(tiny_vit, image_folder):
    path = image_folder(classes=("a", "b", "c"))
    with pytest.raises(InputError, match=r"has 3 classes, the model has 5; give a class map \(--class-map FILE\)"):
        open_data(path, tiny_vit(), need_labels=True)
    with pytest.raises(InputError, match="no classifier"):
        open_data(path, tiny_vit(num_classes=0), need_labels=True)
    assert open_data(path, tiny_vit()).images == 6  # calibration needs no labels
    found = open_data(path, tiny_vit(num_classes=0), class_map={"a": 0, "c": 1})  # to name them, without a head
    assert sorted(everything(found)[1].tolist()) == [0, 0, 1, 1]


def test_images_without_folders_serve_calibration(tiny_vit, tmp_path, jpeg):
    for i in range(3):
        (tmp_path / f"{i}.JPG").write_bytes(jpeg(i))
    assert len(everything(open_data(tmp_path, tiny_vit()))[0]) == 3


def test_preprocessing_follows_the_model_as_it_was_made(tiny_vit, image_folder):
    grey = tiny_vit(in_chans=1, img_size=48)
    config = data_config(grey)
    assert config["input_size"] == (1, 48, 48) and config["mean"] == (0.5,) and config["std"] == (0.5,)
    images, _ = everything(open_data(image_folder(), grey))
    assert images.shape == (10, 1, 48, 48)
    assert grey(images).shape == (10, 5)
    wide = tiny_vit(img_size=(32, 64))
    assert wide(everything(open_data(image_folder(name="wide"), wide))[0]).shape == (10, 5)


def test_hub_data_sets_without_their_package(tiny_vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(InputError, match="pip install datasets"):
        open_data("hfds/somebody/somewhere", tiny_vit())


def test_hub_data_sets(tiny_vit, image_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    expected = everything(open_data(image_folder(name="set/validation"), tiny_vit()))
    found = everything(open_data(f"hfds/{root}", tiny_vit(), need_labels=True))
    mapped = everything(open_data(f"hfds/{root}", tiny_vit(), class_map={c: 4 - i for i, c in enumerate(CLASSES)}))
    assert torch.equal(found[1], expected[1]) and torch.equal(mapped[1], 4 - expected[1])
    assert torch.equal(found[0], expected[0])
    with pytest.raises(InputError, match="cannot read images"):
        open_data(f"hfds/{root}", tiny_vit(), split="nowhere")


def test_the_real_tars_open(tiny_vit, shared_data):
    model = tiny_vit(num_classes=1000)
    synsets = shared_data("imagenet_synsets.txt")
    loader = open_data(
        shared_data("imagenet_validation_1300.tar"), model, class_map=synsets, limit=20, need_labels=True
    )
    images, labels = everything(loader)
    assert loader.images == 20 and images.shape == (20, 3, 32, 32) and len(set(labels.tolist())) == 20
