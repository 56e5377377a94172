"""Small files that name large models: refused before the work is done."""

import json

import pytest
import torch
from mutations import Tally, packed
from safetensors import safe_open

from vitlr.checkpoint import files
from vitlr.checkpoint.bounds import Held
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.origins import build
from vitlr.errors import InputError

CLAIMS = {
    "tables made step by step": ("maxvit_tiny_tf_224", {"img_size": 10_000}),
    "loops over heads": ("convit_tiny", {"num_heads": 1_000_000}),
    "loops that build nothing": ("tiny_vit_21m_512", {}),
    "tables by their temporaries": ("beit_base_patch16_224", {"img_size": 4096, "depth": 1}),
    "a table of positions": ("swinv2_tiny_window8_256", {"window_size": 512, "img_size": 2048}),
    "layers without end": ("vit_tiny_patch16_224", {"depth": 900_000}),
    "a model of a forward pass": ("vit_base_r50_s16_224", {"img_size": 100_000}),
}


@pytest.fixture
def forged(tiny_vit, tmp_path):
    """A function that writes a tiny model's file with another origin and with more tensors, and a digest that fits."""

    def write(name, args, **more):
        path = tmp_path / "m.safetensors"
        files.save(tiny_vit(), path)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["vitlr"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        header["origin"] = {"library": "timm", "name": name, "args": args}
        tensors |= more
        body = {key: value for key, value in header.items() if key != "digest"}
        path.write_bytes(packed({**body, "digest": files._digest(tensors, body)}, tensors))
        return path

    return write


@pytest.mark.parametrize("case", CLAIMS)
def test_a_small_file_cannot_ask_for_much_work(forged, case):
    path, tally = forged(*CLAIMS[case]), Tally()
    create_model("vit_tiny_patch16_224", pretrained=False)  # what is loaded once is not the file's
    tally(case, lambda: files.load(path))
    tally.check()
    print(tally.last)
    assert tally.refused == 1


def test_empty_tensors_are_no_reason_for_depth(forged):
    empty = {f"x.{i}": torch.zeros(0) for i in range(5000)}
    with pytest.raises(InputError, match="depth=4000 does not fit a file of"):
        files.load(forged("vit_tiny_patch16_224", {"depth": 4000}, **empty))


@pytest.mark.parametrize(
    "name", ["beit_large_patch16_512", "swinv2_cr_tiny_384", "maxvit_tiny_tf_384", "hiera_tiny_224"]
)
def test_honest_models_are_within_the_bounds_at_a_tenth_of_their_size(name):
    origin = {"library": "timm", "name": name, "args": {}}
    entries = sum(tensor.numel() for tensor in build(origin, "meta").state_dict().values())
    build(origin, "meta", Held(1000, entries // 10, 4 * entries // 10))
