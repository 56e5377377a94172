"""A training that was cut short goes on to the same bits."""

from __future__ import annotations

import pytest
import torch
from test_train import same, state
from torch.utils.data import DataLoader, Dataset

from vitlr import InputError
from vitlr.training import TrainRecipe, train


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "choice", [{}, {"mixup": 0.4, "model_ema": True}, {"opt": "sgd"}, {"opt": "lion"}, {"grad_accum_steps": 2}]
)
@pytest.mark.parametrize("at", [2, 5, 7])
def test_it_goes_on_to_the_same_bits(vit, loader, quick, tmp_path, choice, at):
    recipe = TrainRecipe(**quick, **choice, recovery_interval=2)

    def make():
        return vit(proj_drop_rate=0.1)

    def stop(step):
        if step.updates == at:
            raise Stop

    whole, cut = make(), make()
    expected = train(whole, loader(), recipe, validate=lambda m: 1.0)
    with pytest.raises(Stop):
        train(cut, loader(), recipe, validate=lambda m: 1.0, resume=tmp_path, callbacks=[stop])
    again, seen = make(), []
    report = train(again, loader(), recipe, validate=lambda m: 1.0, resume=tmp_path, callbacks=[seen.append])
    assert same(state(whole), state(again))
    assert report.epochs == expected.epochs and report.images == expected.images
    assert len(seen) < report.updates or at == 2  # it did not begin anew
    third = make()
    train(third, loader(), recipe, validate=lambda m: 1.0, resume=tmp_path, callbacks=[stop])  # nothing is left to do
    assert same(state(whole), state(third))


def test_data_of_files_goes_on_too(vit, image_folder, quick, tmp_path):
    from vitlr.data.loader import open_data

    recipe = TrainRecipe(**quick, recovery_interval=1, aa="rand-m5", reprob=0.3)
    folder = image_folder(images=4, name="training")

    def stop(step):
        if step.updates == 3:
            raise Stop

    def model_and_data(workers):
        model = vit(num_classes=5)
        return model, open_data(folder, model, batch_size=6, workers=workers, need_labels=True)

    whole, cut = model_and_data(0), model_and_data(0)
    train(*whole, recipe)
    with pytest.raises(Stop):
        train(*cut, recipe, resume=tmp_path / "kept", callbacks=[stop])
    again = model_and_data(1)
    train(*again, recipe, resume=tmp_path / "kept")
    assert same(state(whole[0]), state(again[0]))


class Noisy(Dataset):
    """Images whose noise is drawn wherever they are read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        image, label = self.dataset[item]
        return image + torch.rand(()), label


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"generator": torch.Generator()}])
def test_a_loader_that_draws_goes_on_too(vit, dataset, quick, tmp_path, options):
    def stop(step):
        if step.updates == 8:
            raise Stop

    recipe = TrainRecipe(**{**quick, "epochs": 2}, recovery_interval=4)
    loader = DataLoader(Noisy(dataset), batch_size=8, shuffle=True, **options)
    whole, cut, again = vit(), vit(), vit()
    train(whole, loader, recipe)
    with pytest.raises(Stop):
        train(cut, loader, recipe, resume=tmp_path, callbacks=[stop])
    train(again, loader, recipe, resume=tmp_path)
    assert same(state(whole), state(again))


def test_snapshots_of_another_run_are_refused(vit, loader, quick, tmp_path):
    train(vit(), loader(), TrainRecipe(**quick), resume=tmp_path)
    with pytest.raises(InputError, match="another run: its recipe seed was 0, now it is 1"):
        train(vit(), loader(), TrainRecipe(**quick, seed=1), resume=tmp_path)
    with pytest.raises(InputError, match="another run: its batches"):
        train(vit(), loader(batch_size=16), TrainRecipe(**quick), resume=tmp_path)
