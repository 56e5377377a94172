"""Rounded models: refined by latent weights, integers before and after, in no more bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from test_ladder import same

import vitlr
from vitlr import InputError
from vitlr.measuring.cost import count_bytes
from vitlr.nn.latent_linear import nearest
from vitlr.refinement import distil as distil_rung
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.rounded import Loosened, free_rounded_layers, rounded_layers


@pytest.fixture(scope="module")
def _rounded(proxy_images):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 90}
    dense = vitlr.create_model("vit_tiny_patch16_224", **args).eval()
    for p in dense.parameters():
        p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    stats = vitlr.calibrate(dense, proxy_images, objective="loss", extras=("rounding",), hidden=False)
    return dense, vitlr.apply(dense, vitlr.plan(dense, stats, "bytes:9.5%", method="bits"))


@pytest.fixture
def rounded(_rounded):
    """(dense, rounded): a model at about two bits a weight, and its original."""
    return copy.deepcopy(_rounded)


QUICK = {"steps": 24, "every": 8, "batch_size": 16, "lr": 2.5e-4, "warmup": 2, "ema": 0.8}
QUICK |= {"mixup": False, "crop": 0.5, "amp": False}


@pytest.fixture(scope="module")
def refined(_rounded, proxy_images):
    """A second or two in which codes change."""
    return vitlr.refine(_rounded[1], _rounded[0], proxy_images, rungs="distil", **QUICK)


@pytest.fixture
def distil(rounded, proxy_images):
    dense, small = rounded

    def run(**options):
        return vitlr.refine(small, dense, proxy_images, rungs="distil", **{**QUICK, **options})

    return run


def test_the_model_comes_nearer_in_no_more_bytes_and_holds_integers_again(_rounded, refined, proxy_images, tmp_path):
    dense, small = _rounded
    (rung,) = refined.vitlr_refinement.rungs
    judge = Judge(dense, Proxy(proxy_images).held, 50)
    assert rung.name == "distil" and rung.kept and rung.before.kl == judge(small).kl
    assert judge(refined).kl == rung.after.kl < 0.9 * rung.before.kl
    assert count_bytes(refined) <= count_bytes(small)
    assert rounded_layers(refined) == rounded_layers(small)
    for name in rounded_layers(small):
        new, old = refined.get_submodule(name), small.get_submodule(name)
        assert new.codes.dtype == torch.int8 and torch.equal(new.row_exponent, old.row_exponent)
    vitlr.save(refined, tmp_path / "f")
    loaded = vitlr.load(tmp_path / "f")
    assert same(loaded, refined) and torch.equal(loaded(proxy_images[0]), refined(proxy_images[0]))


def test_all_other_matrices_stay_as_they_were_rounded_and_are_free_again(_rounded, refined):
    small = dict(_rounded[1].named_parameters())
    assert all(p.requires_grad for p in refined.parameters())
    for name in ("head.weight", "patch_embed.proj.weight"):
        assert torch.equal(refined.get_parameter(name), small[name]), name
    assert not torch.equal(refined.norm.weight, small["norm.weight"])


def test_frozen_layers_keep_their_bits(rounded, distil):
    small = rounded[1]
    small.blocks[0].requires_grad_(False)
    small.blocks[1].mlp.fc1.bias = None  # free as its MLP is, by fc2
    assert set(free_rounded_layers(small)) == {name for name in rounded_layers(small) if name.startswith("blocks.1")}
    refined = distil()
    assert refined.vitlr_refinement.rungs[0].kept
    assert same(refined.blocks[0], small.blocks[0]) and not same(refined.blocks[1], small.blocks[1])
    small.blocks[1].mlp.fc2.requires_grad_(False)
    assert "blocks.1.mlp.fc1" not in free_rounded_layers(small)


def test_where_all_codes_are_frozen_the_norms_are_trained(rounded, distil):
    small = rounded[1].requires_grad_(False)
    small.norm.requires_grad_(True)
    refined = distil(steps=8)
    assert not torch.equal(refined.norm.weight, small.norm.weight) and same(refined.blocks, small.blocks)


class Cut(Exception):
    pass


@pytest.mark.parametrize("at", [3, 19])
def test_an_interrupted_run_goes_on_to_the_same_bits(distil, refined, tmp_path, at):
    def cut(done, total):
        if done == at:
            raise Cut

    with pytest.raises(Cut):
        distil(resume=tmp_path, progress=cut)
    steps = []
    resumed = distil(resume=tmp_path, progress=lambda done, total: steps.append(done))
    assert steps[0] == at // 8 * 8 + 1 and same(resumed, refined)
    again = distil(resume=tmp_path, progress=lambda *_: pytest.fail("it had finished"))
    assert same(again, refined)


def test_a_run_that_is_stopped_leaves_integers(rounded, distil):
    def stop(done, total):
        raise Cut

    with pytest.raises(Cut):
        distil(inplace=True, progress=stop)
    assert len(rounded_layers(rounded[1])) == 8 and all(p.requires_grad for p in rounded[1].parameters())


def test_codes_that_would_take_more_bytes_are_drawn_towards_zero_and_no_others(rounded):
    loosened = Loosened(rounded[1])
    noise = [0.6 * torch.randn(u.shape, generator=torch.Generator().manual_seed(3)) for u in loosened.latents]
    with torch.no_grad():
        for u, more in zip(loosened.latents, noise, strict=True):
            u += more
    plain = [nearest(u.detach()) for u in loosened.latents]
    assert loosened.bytes() > 1.02 * loosened.limit
    loosened.settle()
    assert 0.99 * loosened.limit < loosened.bytes() <= loosened.limit
    for u, codes in zip(loosened.latents, plain, strict=True):
        moved = codes - u.detach()
        assert set(moved.abs().unique().tolist()) <= {0.0, 1.0} and bool((moved * codes >= 0).all())
        assert torch.equal(u.detach(), nearest(u.detach()).float())
    settled = [u.detach().clone() for u in loosened.latents]
    loosened.settle()
    assert all(torch.equal(u, was) for u, was in zip(loosened.latents, settled, strict=True))


def test_what_takes_too_many_bytes_is_pressed_and_the_rest_left_alone(rounded):
    loosened = Loosened(rounded[1])
    loosened.limit *= 1.01
    loosened.press(0.1)
    assert all(torch.equal(u, u.round()) for u in loosened.latents)
    with torch.no_grad():
        for u in loosened.latents:
            u += 0.6 * torch.randn(u.shape, generator=torch.Generator().manual_seed(3))
    before, start = [u.detach().clone() for u in loosened.latents], loosened.bytes()
    loosened.press(0.1)
    for u, was in zip(loosened.latents, before, strict=True):
        far = was.abs() > 1  # codes are commoner the nearer they are to 0
        assert float((u.abs() < was.abs())[far].float().mean()) > 0.95
    for _ in range(20):
        loosened.press(0.1)
    assert loosened.bytes() < start


def test_a_run_that_took_more_bytes_is_not_kept(rounded, distil, monkeypatch):
    def loose(self):
        with torch.no_grad():
            for u in self.latents:
                u.copy_(u.round())

    monkeypatch.setattr(Loosened, "settle", loose)
    monkeypatch.setattr(Loosened, "press", lambda self, lr: None)
    monkeypatch.setattr(distil_rung.Rounding, "judge", lambda self, kl: bool(setattr(self, "best", _wild(self))))
    refined = distil()
    (rung,) = refined.vitlr_refinement.rungs
    assert not rung.kept and same(refined, rounded[1]) and "bytes, " in rung.note


def _wild(state):
    """What the state holds, with codes of every size."""
    held = vitlr.runtime.snapshots.copied(state.model)
    return {name: 9 * torch.randn_like(t) if name.endswith("latent") else t for name, t in held.items()}


def test_rungs_that_cannot_move_integers_are_refused_or_passed_over(rounded, proxy_images):
    dense, small = rounded
    for rungs in ("refit", "regrow", ["refit"]):
        with pytest.raises(InputError, match="moves weights that this model holds as integers; take rungs='distil'"):
            vitlr.refine(small, dense, proxy_images, rungs=rungs, **QUICK)
    refined = vitlr.refine(small, dense, proxy_images, rungs=["refit", "distil"], **QUICK)
    assert [rung.name for rung in refined.vitlr_refinement.rungs] == ["distil"]


@pytest.mark.parametrize("method", ["bits", "mix"])
def test_compress_refines_what_it_rounded(rounded, proxy_images, method):
    small = vitlr.compress(rounded[0], proxy_images, "bytes:9.5%", method=method, rungs="distil", **QUICK)
    (rung,) = small.vitlr_refinement.rungs
    assert rung.steps == 24 and rung.after.kl <= rung.before.kl and rounded_layers(small)
    assert count_bytes(small) <= small.vitlr_info["plan"]["bytes_kept"] * 1.001
