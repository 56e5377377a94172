"""`vitlr finetune`: what it writes and reports, how it goes on, what it refuses."""

from __future__ import annotations

import pytest
from commandline import NAME, TINY, nothing_left

import vitlr
from vitlr.training import state as training_state

QUICK = {"epochs": 2, "lr": 0.001, "batch-size": 8}


@pytest.fixture
def finetune(weights, image_folder, tmp_path):
    """The arguments of a small `finetune` of a dense model; keywords replace or add options, None takes one out."""
    usual = {
        "checkpoint": weights,
        "data": image_folder(images=4, name="labelled"),
        "out": tmp_path / "tuned.safetensors",
    }

    def make(*flags, model=NAME, **options):
        options = {**usual, **QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
        given = [text for key, value in options.items() if value is not None for text in (f"--{key}", value)]
        return ["finetune", model, *given, *flags, *TINY]

    return make


def test_a_compressed_model_learns_from_labels_and_from_the_dense_one(run, squeeze, finetune, tmp_path, weights):
    small, out = tmp_path / "small.safetensors", tmp_path / "tuned.safetensors"
    assert run(*squeeze(out=small)).status == 0
    data = tmp_path / "labelled"
    values = run(*finetune("--json", model=small, reference=NAME, val_data=data)).json
    keys = ["out", "params", "bytes", "epochs", "kept", "updates", "images", "note", "skipped", "seconds"]
    assert list(values) == keys
    assert values["updates"] == 4 and values["images"] == 32 and values["kept"] in (1, 2) and values["note"] == ""
    assert all(epoch["distillation"] > 0 and epoch["validation"] >= 0 for epoch in values["epochs"])
    before, after = vitlr.load(small), vitlr.load(out)
    assert {n: p.shape for n, p in before.named_parameters()} == {n: p.shape for n, p in after.named_parameters()}
    assert not all((p == q).all() for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert after.vitlr_info["plan"] == before.vitlr_info["plan"]
    recipe = after.vitlr_info["recipe"]
    assert recipe["budget"] == before.vitlr_info["recipe"]["budget"] and recipe["training"]["reference"] == NAME
    assert run("validate", out, "--data", data).status == 0


def test_people_read_it_too(run, finetune):
    answer = run(*finetune(mixup=0.2, aa="rand-m3", reprob=0.2))
    assert answer.status == 0, answer.err
    assert "epoch 2: loss" in answer.out and "wrote" in answer.out and "training: " in answer.err


def test_an_interrupted_training_goes_on(run, finetune, tmp_path, monkeypatch):
    whole, kept = tmp_path / "whole.safetensors", tmp_path / "kept"
    assert run(*finetune(out=whole)).status == 0
    real = training_state.State.update

    def interrupt(self):
        if self.updates == 3:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(training_state.State, "update", interrupt)
    answer = run(*finetune(resume=kept))
    assert answer.status == 130 and str(kept) in answer.err and nothing_left(tmp_path, "tuned.safetensors")
    assert "--resume DIR" in run(*finetune()).err
    monkeypatch.setattr(training_state.State, "update", real)
    assert run(*finetune(resume=kept)).status == 0
    first, second = (vitlr.load(path).state_dict() for path in (whole, tmp_path / "tuned.safetensors"))
    assert all((first[key] == second[key]).all() for key in first)
    assert "another run: its recipe lr was 0.001, now it is 0.1" in run(*finetune(resume=kept, lr=0.1)).err
    renamed = (tmp_path / "labelled").rename(tmp_path / "others")
    (renamed / "a" / "0.jpg").rename(renamed / "a" / "9.jpg")
    assert "another run: its data" in run(*finetune(resume=kept, data=renamed)).err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "--data is missing"),
        ({"out": None}, "--out is missing"),
        ({"distill_loss_weight": 0.3}, "--distill-loss-weight goes with --reference"),
        ({"reference_checkpoint": "w.safetensors"}, "--reference-checkpoint goes with --reference"),
        ({"lr": -1}, "--lr -1"),
        ({"opt": "best"}, "--opt 'best' is unknown"),
        ({"sched": "plateau"}, "unknown --sched 'plateau'"),
        ({"warmup_epochs": 2}, "leaves nothing of 2 epochs"),
        ({"mixup": -1}, "--mixup -1"),
    ],
)
def test_bad_usage_is_refused_early(refused, finetune, unread, options, said):
    assert said in refused(*finetune(**options))


def test_more_bad_usage(refused, finetune, weights, tmp_path):
    assert "expected a folder" in refused(*finetune(resume=weights))
    assert "--out and --checkpoint are both" in refused(*finetune(out=weights))
    assert "no data at" in refused(*finetune(data=tmp_path / "nowhere"))


def test_an_unknown_policy_is_named(run, finetune):
    answer = run(*finetune(aa="nonsense"))
    assert answer.status == 2 and "timm makes no training transform of" in answer.err


def test_a_loss_that_is_no_number_ends_it_and_says_so(run, finetune, tmp_path, tiny_vit):
    answer = run(*finetune("--json", lr=1e9, clip_grad=1e9, warmup_epochs=0))
    values = answer.json
    assert answer.status == 0 and "stopped, kept the best before it" in values["note"] and values["kept"] == 0
    kept = vitlr.load(tmp_path / "tuned.safetensors").state_dict()
    assert all((kept[name] == tensor).all() for name, tensor in tiny_vit().state_dict().items())


def test_files_that_cannot_be_read_are_named_and_all_of_them_are_refused(run, finetune, image_folder, tmp_path):
    files = sorted(image_folder(images=4, name="holed").rglob("*.jpg"))
    files[3].write_bytes(b"no image")
    answer = run(*finetune(data=tmp_path / "holed"))
    assert answer.status == 0 and answer.err.count("warning: skipped 1 of 20 images") == 1
    for path in files:
        path.write_bytes(b"no image")
    answer = run(*finetune(data=tmp_path / "holed", out=tmp_path / "none.safetensors"))
    assert answer.status == 2 and "no image of the first epoch could be read" in answer.err.splitlines()[-1]
    assert nothing_left(tmp_path, "none.safetensors")


def test_data_of_other_classes_is_refused(refused, finetune, image_folder):
    assert "classes" in refused(*finetune(data=image_folder(classes=("a", "b"), name="two")))
