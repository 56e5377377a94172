"""Tables of the library `datasets` given as data: columns are found by what they hold, and classes may be missing."""

import io

import pytest
import torch
from PIL import Image

import vitlr
from vitlr.data import open_data
from vitlr.errors import InputError

datasets = pytest.importorskip("datasets")


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(columns=("picture", "kind"), classes=True, count=10):
    image, label = columns
    features = {image: datasets.Image(), "note": datasets.Value("string")}
    rows = {image: [picture(i) for i in range(count)], "note": ["x"] * count}
    if classes:
        features[label] = datasets.ClassLabel(names=list("abcde"))
        rows[label] = [i % 5 for i in range(count)]
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_columns_may_have_any_names(tiny_vit):
    model = tiny_vit()
    found = [
        everything(open_data(table(columns), model, need_labels=True)) for columns in (("image", "label"), ("x", "y"))
    ]
    assert found[0][0].shape == (10, 3, 32, 32) and len(found[0][1].unique()) == 5
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_images_without_classes_serve_calibration_and_are_refused_where_labels_are_needed(tiny_vit):
    model, data = tiny_vit(), table(classes=False)
    small = vitlr.compress(model, open_data(data, model), "params:70%", rank_step=4)
    with torch.no_grad():
        x = everything(open_data(data, model))[0]
        assert not torch.equal(small(x), model(x))
    with pytest.raises(InputError, match="classes"):
        open_data(data, model, need_labels=True)


def columns(label, kind):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [picture(i) for i in range(len(label))], "label": label}
    return datasets.Dataset.from_dict(rows, features=features)


def test_classes_may_be_plain_numbers_or_names_and_missing(tiny_vit):
    model, numbers = tiny_vit(), [i % 5 for i in range(10)]
    expected = everything(open_data(columns(numbers, datasets.ClassLabel(names=list("abcde"))), model))
    for label, kind in ((numbers, "int64"), ([f"kind {i}" for i in numbers], "string")):
        found = everything(open_data(columns(label, datasets.Value(kind)), model, need_labels=True))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    reversed_order = {str(i): 4 - i for i in range(5)}
    words = columns([str(i) for i in numbers], datasets.Value("string"))
    mapped = open_data(words, model, class_map=reversed_order)
    assert torch.equal(everything(mapped)[1], 4 - expected[1])
    for missing in (None, -1):  # as sets for a competition have it
        for kind in (datasets.Value("int64"), datasets.ClassLabel(names=list("abcde"))):
            unlabelled = open_data(columns([missing] * 10, kind), model, need_labels=None)
            assert vitlr.evaluate(model, unlabelled, model).top1 is None
    with pytest.raises(InputError, match=r"column label of .* holds neither numbers of classes nor names"):
        open_data(columns([0.5] * 10, datasets.Value("float32")), model)


def test_a_transform_of_its_owner_is_passed_by(tiny_vit):
    plain = columns([0, 1, 2, 3, 4], datasets.Value("int64"))
    own = plain.with_transform(lambda rows: {"pixel_values": [0] * len(rows["image"])})
    found, expected = (everything(open_data(data, tiny_vit(), need_labels=True)) for data in (own, plain))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (lambda: datasets.DatasetDict({"train": table(), "test": table()}), r"2 splits \(train, test\); give one"),
        (lambda: table().to_iterable_dataset(), "is a IterableDataset, expected a folder"),
        (lambda: table().remove_columns("picture"), "none of its columns"),
        (lambda: 3, "is a int, expected a folder"),
    ],
)
def test_what_is_no_table_of_images_is_refused_in_one_line(tiny_vit, data, word):
    with pytest.raises(InputError, match=word):
        open_data(data(), tiny_vit())
