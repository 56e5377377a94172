"""Models as folders, on this machine and on a Hub: written, pushed, opened by vitlr and timm, refused with reasons."""

from __future__ import annotations

import json
import pickle
import shutil
import time

import pytest
import timm
import torch
from fake_hub import COMMIT, Hub

import vitlr
from vitlr.anatomy.attention import attentions
from vitlr.errors import InputError
from vitlr.surgery.attention import narrow_attention

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def dense(tiny_vit):
    return tiny_vit()


@pytest.fixture(scope="module")
def small(dense):
    generator = torch.Generator().manual_seed(1)
    loader = [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(3)]
    return vitlr.compress(dense, loader, "params:70%", rank_step=4)


@pytest.fixture(scope="module")
def folders(dense, small, tmp_path_factory):
    """Both as folders, by name."""
    place = tmp_path_factory.mktemp("folders")
    return {name: vitlr.save_pretrained(model, place / name) for name, model in (("small", small), ("dense", dense))}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that huggingface_hub takes for the one, with an empty cache."""
    from huggingface_hub import constants

    made = Hub()
    with made.serving() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield made


def serve(hub: Hub, name: str, folder) -> None:
    hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_gives_the_same_logits(small, folders, images):
    folder = folders["small"]
    for again in (
        vitlr.load(f"local-dir:{folder}"),
        vitlr.from_pretrained(folder),
        vitlr.from_pretrained(f"local-dir:{folder}"),
    ):
        assert torch.equal(again(images), small(images))
    assert again.vitlr_info["plan"]["budget"] == "params:70%"


def test_timm_opens_what_is_dense_and_as_wide_as_it_was(small, images, tmp_path):
    full = vitlr.to_dense(small, full_width=True)
    assert torch.allclose(full(images), small(images), atol=1e-5)
    folder = vitlr.save_pretrained(full, tmp_path / "full")
    for made in (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        vitlr.create_model(f"local-dir:{folder}"),
        vitlr.from_pretrained(folder),
    ):
        assert torch.equal(made(images), full(images))
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)(images).shape == (6, 3)


def test_timms_own_folder_is_opened_and_config_is_as_timm_writes_it(dense, images, tmp_path):
    from timm.models import save_for_hf

    twin = timm.create_model(NAME, **TINY).eval()
    twin.load_state_dict(dense.state_dict())
    save_for_hf(twin, tmp_path / "timm", model_args={"img_size": 32})
    assert torch.equal(vitlr.from_pretrained(tmp_path / "timm")(images), dense(images))
    theirs = json.loads((tmp_path / "timm" / "config.json").read_text())
    ours = json.loads((vitlr.save_pretrained(dense, tmp_path / "ours") / "config.json").read_text())
    assert ours.pop("vitlr") == vitlr.__version__
    assert ours["pretrained_cfg"].pop("license") is None  # nobody knows what these weights are under
    theirs["pretrained_cfg"].pop("license")
    assert ours == theirs


def test_the_card_says_what_it_is_and_what_it_costs(small, tmp_path):
    metrics = {"images": 1300, "top1": 78.25, "top1_low": 75.93, "top1_high": 80.4, "agreement": 90.0, "kl": 0.1234}
    base = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    folder = vitlr.save_pretrained(small, tmp_path / "small", metrics=metrics, base_model=base)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntags:\n- vitlr\n") and f"\nlicense: apache-2.0\nbase_model: {base}\n---\n" in card
    assert "`params:70%` (method joint)" in card and 'vitlr.load("local-dir:small")' in card
    assert "| top-1, % (95 %) | 78.25 (75.9 to 80.4) |  |" in card and "| KL to dense, nats | 0.1234 |  |" in card
    plan = vitlr.Plan.from_dict(small.vitlr_info["plan"])
    assert f"| parameters | {plan.params_kept:,} | {plan.params:,} |" in card
    assert "timm.create_model" not in card  # its MLPs are narrower than timm makes them
    pytest.importorskip("matplotlib")
    assert "](kept.png)" in card and (folder / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_of_ones_own_needs_a_dense_one(images, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 8)).eval()
    folder = vitlr.save_pretrained(model, tmp_path / "own", model_args=None, license="mit")
    assert json.loads((folder / "config.json").read_text()) == {"vitlr": vitlr.__version__}
    assert torch.equal(vitlr.from_pretrained(folder, model=model)(images), model(images))
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "model=dense" in card
    with pytest.raises(InputError, match="pass a dense one"):
        vitlr.from_pretrained(folder)


def test_pushed_and_opened_by_name_with_what_it_was_made_from(hub, small, images):
    address = vitlr.push_to_hub(small, "me/small", token="right", message="A smaller one", base_model="you/base")
    assert address.endswith("/me/small") and hub.messages == ["A smaller one"]
    assert hub.repositories["me/small"].keys() >= {"model.safetensors", "config.json", "README.md"}
    assert b'vitlr.load("hf-hub:me/small")' in hub.repositories["me/small"]["README.md"]
    for again in (
        vitlr.from_pretrained("me/small"),
        vitlr.load("hf-hub:me/small"),
        vitlr.load(f"hf-hub:me/small@{COMMIT}"),
    ):
        assert torch.equal(again(images), small(images))
    assert b"base_model: you/base" in hub.repositories["me/small"]["README.md"]


def test_weights_of_the_hub_are_remembered_as_the_base(hub, dense, folders, images, tmp_path):
    serve(hub, "you/base", folders["dense"])
    made = vitlr.create_model("hf-hub:you/base")
    assert torch.equal(made(images), dense(images)) and made.vitlr_base == "you/base"
    vitlr.save(vitlr.to_dense(made), tmp_path / "copy.safetensors")
    again = vitlr.load(tmp_path / "copy.safetensors")
    assert "base_model: you/base\n" in (vitlr.save_pretrained(again, tmp_path / "s") / "README.md").read_text()


def test_the_cache_serves_where_the_hub_is_gone(hub, small, folders, images, monkeypatch):
    from huggingface_hub import constants

    serve(hub, "me/small", folders["small"])
    vitlr.load("hf-hub:me/small")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert torch.equal(vitlr.load("hf-hub:me/small")(images), small(images))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries for half a minute
    with pytest.raises(
        InputError, match=r"hf-hub:me/other: config\.json is not in the cache, .* name it local-dir:DIR"
    ):
        vitlr.load("hf-hub:me/other")
    print(time.time())
    import sys

    sys.stdout.flush()
    with pytest.raises(InputError, match=r"could not push to hf-hub:me/small: .*write the folder with vitlr\.save_pre"):
        vitlr.push_to_hub(small, "me/small", token="right")


WRONG = {
    "nobody/knows": "the Hub knows no such repository",
    "me/small@nowhere": "there is no revision 'nowhere'",
    "me/gated": "for those only who accept its terms",
    "me/empty": r"has no config\.json; expected a folder that timm or vitlr wrote",
    "me/pickled": r"has no model\.safetensors; other weights, such as pickled ones, are not read",
    "me/damaged": r"config\.json cannot be read",
    "three/part/name": "names no repository; expected hf-hub:OWNER/NAME",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_the_hub_is_said_in_one_line(hub, folders, name):
    serve(hub, "me/small", folders["small"])
    config, bomb = (folders["dense"] / "config.json").read_bytes(), pickle.dumps(Evil())
    hub.repositories |= {"me/gated": {"config.json": config}, "me/empty": {}}
    hub.repositories["me/damaged"] = {"config.json": b"{", "model.safetensors": b"{"}
    hub.repositories["me/pickled"] = {"config.json": config, "pytorch_model.bin": bomb}
    hub.gated.add("me/gated")
    for opened in (vitlr.load, vitlr.create_model):
        with pytest.raises(InputError, match=f"{name}.*{WRONG[name]}") as caught:
            opened(f"hf-hub:{name}")
        assert "\n" not in str(caught.value)
    assert not any("pytorch_model" in asked for asked in hub.asked) and not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_pushing_without_rights_says_so(hub, small):
    with pytest.raises(InputError, match=r"could not push to hf-hub:me/small: .*hf auth whoami"):
        vitlr.push_to_hub(small, "me/small", token="wrong")
    with pytest.raises(InputError, match="'small' is no repository's name"):
        vitlr.push_to_hub(small, "small")


def test_folders_that_are_none_and_models_of_the_wrong_door(small, folders, tmp_path):
    folder = shutil.copytree(folders["small"], tmp_path / "small")
    with pytest.raises(InputError, match=r"it was written by vitlr: open it with vitlr\.load"):
        vitlr.create_model(f"local-dir:{folder}")
    with pytest.raises(InputError, match="there is no such folder; expected local-dir:FOLDER"):
        vitlr.load(f"local-dir:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="is no folder and no repository; expected a folder or OWNER/NAME"):
        vitlr.from_pretrained(tmp_path / "none")
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"was not written by vitlr; make its model with vitlr\.create_model"):
        vitlr.load(f"local-dir:{folder}")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        vitlr.save_pretrained(small, tmp_path / "file" / "folder")


def test_heads_that_are_gone_have_no_full_width(tiny_vit):
    model = tiny_vit()
    attention = attentions(model)[0]["blocks.0.attn"]
    narrow_attention(model, attention, torch.arange(attention.head_dim))
    with pytest.raises(InputError, match=r"blocks\.0\.attn lost whole heads"):
        vitlr.to_dense(model, full_width=True)
