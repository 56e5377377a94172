"""Rounded models: refined by latent weights, integers before and after, in no more bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_ladder import same

import vitlr
from vitlr.measuring.cost import count_bytes
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.rounded import rounded_layers


@pytest.fixture(scope="module")
def _rounded(proxy_images):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    dense = vitlr.create_model("vit_tiny_patch16_224", **args).eval()
    for p in dense.parameters():
        p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    dense.head.weight.data *= 4  # answers that care
    stats = vitlr.calibrate(dense, proxy_images, objective="loss", extras=("rounding",), hidden=False)
    return dense, vitlr.apply(dense, vitlr.plan(dense, stats, "bytes:9%", method="bits"))


@pytest.fixture
def rounded(_rounded):
    """(dense, rounded): a model at about two bits a weight, and its original."""
    return copy.deepcopy(_rounded)


@pytest.fixture
def quick() -> dict:
    quick = {"steps": 40, "every": 20, "batch_size": 8, "lr": 1e-3, "code_lr": 0.03, "warmup": 2, "ema": 0.8}
    return {**quick, "amp": False}


@pytest.fixture
def distil(rounded, proxy_images, quick):
    dense, small = rounded

    def run(**options):
        return vitlr.refine(small, dense, proxy_images, rungs="distil", **{**quick, **options})

    return run


def test_the_model_comes_nearer_in_no_more_bytes_and_holds_integers_again(rounded, distil, proxy_images, tmp_path):
    dense, small = rounded
    refined = distil()
    (rung,) = refined.vitlr_refinement.rungs
    judge = Judge(dense, Proxy(proxy_images).held, 50)
    assert rung.kept and judge(refined).kl == rung.after.kl < 0.9 * judge(small).kl
    assert count_bytes(refined) <= count_bytes(small)
    assert rounded_layers(refined) == rounded_layers(small) and not same(refined, small)
    for name in rounded_layers(small):
        new, old = refined.get_submodule(name), small.get_submodule(name)
        assert new.codes.dtype == torch.int8 and not torch.equal(new.codes, old.codes)
        assert torch.equal(new.row_exponent, old.row_exponent)
    vitlr.save(small, tmp_path / "before")
    vitlr.save(refined, tmp_path / "after", recipe={})
    assert same(vitlr.load(tmp_path / "after"), refined)
    assert torch.equal(vitlr.load(tmp_path / "after")(proxy_images[0]), refined(proxy_images[0]))
    assert (tmp_path / "after").stat().st_size <= (tmp_path / "before").stat().st_size + 100
