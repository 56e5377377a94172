"""The proxy images: the split, the training view, and that nothing depends on workers or on where a run starts."""

from __future__ import annotations

import itertools

import pytest
import torch

import vitlr
from vitlr.data.loader import open_data
from vitlr.refinement.images import Proxy

CHOICES = {"batch_size": 6, "seed": 3, "crop": 0.3, "jitter": 0.4, "mix": True}


def first(proxy, count, start=0, **choices):
    return list(itertools.islice(proxy.mixed(start=start, **{**CHOICES, **choices}), count))


@pytest.fixture
def opened(image_folder, tiny_vit):
    folder = image_folder(images=8)
    return lambda **options: open_data(folder, tiny_vit(), batch_size=7, **options)


def test_held_out_images_are_never_learnt_from(proxy_images, opened):
    for loader, count in ((proxy_images, 60), (opened(), 40)):
        proxy = Proxy(loader)
        assert len(proxy.held) == max(8, round(0.15 * count)) and proxy.count == count - len(proxy.held)
        learnt = torch.cat(list(proxy.plain(count)))
        assert len(learnt) == proxy.count
        same = (learnt[:, None] == proxy.held[None]).flatten(2).all(2)
        assert not same.any()
        assert torch.equal(Proxy(loader).held, proxy.held)


def test_the_held_out_images_are_spread(opened):
    loader = opened()
    order = [loader.dataset.chosen[i][0] for i in range(40)]
    held = sorted(order[-8:])  # files are sorted by class, eight of each of the five
    assert len({index // 8 for index in held}) >= 4


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_step_k_is_the_same_however_it_is_reached(proxy_images, opened, kind):
    proxy = Proxy(proxy_images if kind == "tensors" else opened())
    batches = first(proxy, 9)
    assert all(torch.equal(a, b) for a, b in zip(batches[5:], first(proxy, 4, start=5), strict=True))
    assert not torch.equal(batches[0], first(proxy, 1, seed=4)[0])
    assert not torch.equal(batches[0], first(proxy, 1, mix=False)[0])
    assert not torch.equal(batches[0], first(proxy, 1, jitter=0.0)[0])
    assert not torch.equal(batches[0], first(proxy, 1, crop=1.0)[0])
    assert batches[0].shape == (6, 3, 32, 32)


def test_half_of_the_images_are_mirrored(proxy_images):
    proxy = Proxy(proxy_images)
    known = torch.cat(list(proxy.plain(60)))
    seen = torch.cat(first(proxy, 4, crop=1.0, jitter=0.0, mix=False))
    as_is, mirrored = (
        (seen[:, None] - x[None]).abs().flatten(2).amax(2).amin(1) < 1e-3 for x in (known, known.flip(3))
    )
    assert (as_is | mirrored).all() and 6 <= mirrored.sum() <= 18


def test_pairs_are_mixed(proxy_images):
    proxy = Proxy(proxy_images)
    plain, mixed = (torch.cat(first(proxy, 8, mix=mix)) for mix in (False, True))
    changed = (plain != mixed).flatten(1).float().mean(1)
    assert (changed > 0).float().mean() > 0.5  # by mixup every pixel, by cutmix a box of them
    assert changed.max() == 1 and ((changed > 0) & (changed < 1)).any()


def test_workers_change_no_pixel(opened):
    alone, helped = (first(Proxy(opened(workers=workers)), 5) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_random_states_are_left_alone(proxy_images):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    proxy = Proxy(proxy_images)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    first(proxy, 2)
    assert draw() == expected


def test_every_image_is_seen_once_in_an_epoch(proxy_images):
    from vitlr.data.seeds import Schedule

    drawn = list(itertools.chain.from_iterable(itertools.islice(Schedule(range(12), 5, 0, 0), 12)))
    positions, seeds = zip(*drawn, strict=True)
    for epoch in range(5):
        assert sorted(positions[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert positions[:12] != positions[12:24] and len(set(seeds)) == 60


def test_corrupt_files_are_left_out(image_folder, tiny_vit):
    folder = image_folder(images=8)
    (folder / "a" / "0.jpg").write_bytes(b"no image")
    loader = open_data(folder, tiny_vit(), batch_size=8)
    sizes = [len(batch) for batch in first(Proxy(loader), 6, batch_size=8)]
    assert set(sizes) <= {6, 8} and loader.skipped == 1


def test_held_out_files_that_cannot_be_read_are_counted(image_folder, tiny_vit):
    folder = image_folder(images=8)
    for path in folder.rglob("*.jpg"):
        if path.stem < "4":
            path.write_bytes(b"no image")
    with pytest.raises(vitlr.InputError, match=r"\d of 8 held-out images could be read, expected 8"):
        Proxy(open_data(folder, tiny_vit(), batch_size=8))


def test_grey_images_are_augmented_too(image_folder, tiny_vit):
    loader = open_data(image_folder(images=8), tiny_vit(in_chans=1), batch_size=8)
    assert first(Proxy(loader), 1)[0].shape == (6, 1, 32, 32)


def test_dicts_and_pairs_are_read(proxy_images):
    expected = Proxy(proxy_images).held
    assert torch.equal(Proxy([{"pixel_values": x, "labels": torch.zeros(len(x))} for x in proxy_images]).held, expected)
    assert torch.equal(Proxy([(x, torch.zeros(len(x))) for x in proxy_images]).held, expected)
    assert vitlr.InputError
