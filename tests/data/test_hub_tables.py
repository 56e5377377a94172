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
