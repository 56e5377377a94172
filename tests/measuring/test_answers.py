"""What a model's answer is: logits, features or one number, decided from the answer and where the last linear is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy import linears
from vitlr.data.batches import first_tensor
from vitlr.errors import InputError
from vitlr.measuring.losses import divergence, is_logits, what_is

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Headed(nn.Module):
    """A headless backbone with a head of any name."""

    def __init__(self, backbone, name, head):
        super().__init__()
        self.backbone, self.name = backbone, name
        self.add_module(name, head)

    def forward(self, x):
        return getattr(self, self.name)(self.backbone(x))


class HeadFirst(nn.Module):
    """A head of an unusual name that was made before the backbone."""

    def __init__(self, backbone, head):
        super().__init__()
        self.task, self.backbone = head, backbone

    def forward(self, x):
        return self.task(self.backbone(x))


def beside_the_lost_one(tiny_vit, head):
    """A timm model without a classifier that was given one under another name."""
    model = tiny_vit(num_classes=0)
    model.fc = head
    base = type(model)
    model.__class__ = type("Mine", (base,), {"forward": lambda self, x: self.fc(base.forward(self, x))})
    return model


def assigned(tiny_vit):
    model = tiny_vit(num_classes=7)
    model.head = nn.Linear(32, 5)  # num_classes stays 7
    return model.eval()


LOGITS = {
    "timm's own": (lambda make: make(), "logits [images, 5] of head"),
    "a head put in timm's place": (assigned, "logits [images, 5] of head"),
    "a head in a sequence": (lambda make: nn.Sequential(make(num_classes=0), nn.Linear(32, 5)), "of 1"),
    "a head of another name": (lambda make: Headed(make(num_classes=0), "top", nn.Linear(32, 5)), "of top"),
    "a head of two layers": (
        lambda make: Headed(make(num_classes=0), "mine", nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 5))),
        "of mine.2",
    ),
    "a head made before the backbone": (lambda make: HeadFirst(make(num_classes=0), nn.Linear(32, 5)), "of task"),
    "a head beside timm's": (lambda make: beside_the_lost_one(make, nn.Linear(32, 5)), "of fc"),
    "a sequence beside timm's": (
        lambda make: beside_the_lost_one(make, nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))),
        "of fc.1",
    ),
    "in a data-parallel wrapper": (lambda make: nn.DataParallel(assigned(make)), "of module.head"),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_logits_are_known_by_the_last_linear(tiny_vit, kind):
    make, said = LOGITS[kind]
    model = make(tiny_vit).eval()
    answer = model(X)
    assert is_logits(model, answer) and said in what_is(model, answer)[1]
    head = what_is(model, answer)[1].rpartition(" ")[2]
    assert linears.kept(model)[head] == "the classifier" and head not in linears.targets(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda make: make(num_classes=0),
        lambda make: nn.Sequential(make(num_classes=0)),
        lambda make: nn.DataParallel(make(num_classes=0)),
        lambda make: Headed(make(num_classes=0), "visual_projection", nn.Linear(32, 8)),
    ],
)
def test_features_and_projections_are_no_logits(tiny_vit, make):
    model = make(tiny_vit).eval()
    assert not is_logits(model, model(X)) and "features [images," in what_is(model, model(X))[1]


def test_a_stale_number_of_classes_changes_no_statistics(tiny_vit, batches):
    """The loss drawn is that of logits, so the plan predicts nats."""
    stale, fresh = assigned(tiny_vit), tiny_vit()
    fresh.load_state_dict(stale.state_dict())
    a, b = (vitlr.calibrate(model, batches, objective="loss", hidden=False) for model in (stale, fresh))
    for name, layer in a.layers.items():
        assert torch.equal(layer.gradient, b.layers[name].gradient)
    assert "the answer is taken for logits [images, 5] of head" in str(a)


def test_one_number_an_image_may_be_a_row_of_none(tiny_vit, batches):
    class Squeezed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).squeeze(-1)

    model = tiny_vit(num_classes=1)
    stats, bare = (vitlr.calibrate(m, batches, hidden=False) for m in (Squeezed(model), model))
    assert stats.answer == bare.answer == "one number an image: its squared change counts"
    for name, layer in bare.layers.items():
        assert torch.equal(stats.layers[f"net.{name}"].gradient, layer.gradient)


def test_one_number_an_image_is_taken_as_it_is(tiny_vit, batches):
    """Its direction is its sign: normalised, every gradient would be rounding noise."""
    model = tiny_vit(num_classes=1)
    stats = vitlr.calibrate(model, batches)
    assert stats.answer == "one number an image: its squared change counts"
    assert max(float(layer.gradient.abs().max()) for layer in stats.layers.values()) > 1e-4
    errors = []
    for budget in ("params:60%", "params:90%"):
        plan = vitlr.plan(model, stats, budget, rank_step=4, method="lowrank")
        small = vitlr.apply(model, plan)
        with torch.no_grad():
            errors.append((plan.error, sum(float((small(x) - model(x)).square().sum()) / 2 for x, _ in batches) / 11))
    for predicted, true in errors:
        assert 0.1 < predicted / true < 10
    assert errors[0][0] > errors[1][0] and errors[0][1] > errors[1][1]
    with pytest.raises(InputError, match="one number an image, and accuracy needs two classes"):
        vitlr.evaluate(model, batches)
    labelled = [(x, y % 2) for x, y in batches]
    metrics = vitlr.evaluate(model, labelled, model, output_fn=lambda z: torch.cat([-z, z], 1) / 2)
    assert metrics.agreement == 100 and metrics.kl == 0


class Softened(nn.Module):
    """A classifier whose answer are probabilities."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(-1)


def test_probabilities_are_taken_by_their_logarithms(tiny_vit, batches):
    """softmax of them once more would make every image a doubt."""
    plain, soft = tiny_vit(), Softened(tiny_vit())
    assert what_is(soft, soft(X)) == (True, "probabilities [images, 5], their logarithms for logits")
    a, b = (vitlr.calibrate(model, batches, hidden=False) for model in (plain, soft))
    for name, layer in a.layers.items():
        assert (layer.gradient - b.layers[f"net.{name}"].gradient).norm() < 1e-4 * layer.gradient.norm()
    small = vitlr.apply(plain, vitlr.plan(plain, a, "params:70%", rank_step=4, method="lowrank"))
    ours, theirs = vitlr.evaluate(small, batches, plain), vitlr.evaluate(Softened(small), batches, soft)
    assert theirs.kl == pytest.approx(ours.kl, rel=1e-4) and ours.kl > 1e-3
    assert divergence(soft(X), Softened(small)(X), True, 2.0).item() == pytest.approx(
        divergence(plain(X), small(X), True, 2.0).item(), rel=1e-4
    )


class TwoTasks(nn.Module):
    """A head for each of two tasks."""

    def __init__(self, net, heads):
        super().__init__()
        self.net, self.heads = net, heads

    def forward(self, x):
        answer = self.net(x)
        return [head(answer) for head in self.heads.children()]


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda heads: nn.ModuleDict({"a": heads[0], "b": heads[1]})])
def test_every_head_of_several_tasks_is_a_classifier(tiny_vit, kind):
    model = TwoTasks(tiny_vit(num_classes=0), kind([nn.Linear(32, 5), nn.Linear(32, 4)])).eval()
    assert set(linears.kept(model).values()) == {"the classifier"} and len(linears.kept(model)) == 2
    for answer in model(X):
        assert is_logits(model, answer)


def test_answers_in_dicts_and_tuples():
    logits, features = torch.randn(2, 5), torch.randn(2, 4, 8)
    loss = torch.tensor(0.5)
    for answer in (
        {"loss": loss, "logits": logits},
        {"hidden": features, "logits": logits},
        (loss, logits, features),
        [logits, features],
        {"out": logits},
        (loss, {"logits": logits}),
        (None, logits),
        (loss.unsqueeze(0), logits),  # of several devices
        {"loss": loss.expand(2), "prediction": logits},
    ):
        assert first_tensor(answer) is logits
    assert first_tensor((loss, loss.expand(2))).shape == (2, 1)
    for answer in ({}, loss, (loss,), None, (None,), "text"):
        with pytest.raises(InputError, match="pass output_fn= to pick one"):
            first_tensor(answer)


class Two(nn.Module):
    """Two answers in a tuple, the second one what counts."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        answer = self.net(x)
        return answer.new_zeros(len(x), 3), answer


def test_output_fn_picks_the_answer_in_every_stage(tiny_vit, batches, caplog):
    dense = Two(tiny_vit())
    pick = lambda answer: answer[1]  # noqa: E731
    small = vitlr.compress(dense, batches, "params:70%", rank_step=4, method="lowrank", output_fn=pick)
    bare = vitlr.compress(dense.net, batches, "params:70%", rank_step=4, method="lowrank")
    assert torch.equal(small(X)[1], bare(X))
    assert vitlr.evaluate(small, batches, dense, output_fn=pick) == vitlr.evaluate(bare, batches, dense.net)
    images = [torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2))]
    how = {"rungs": ["distil"], "steps": 3, "batch_size": 8, "lr": 1e-3}
    better = vitlr.refine(small, dense, images, output_fn=pick, **how)
    as_bare = vitlr.refine(bare, dense.net, images, **how)
    assert better.vitlr_refinement.rungs[0].after == as_bare.vitlr_refinement.rungs[0].after
    with pytest.raises(InputError, match=r"no gradient .*output_fn= picks another"):
        vitlr.calibrate(dense, batches)  # the first answer is a constant
    vitlr.calibrate(Swapped(dense.net), batches)
    assert "it is the first of 2 tensors, output_fn= picks another" in caplog.text


class Swapped(Two):
    def forward(self, x):
        return super().forward(x)[::-1]


def test_patch_embeddings_that_are_linears_stay_dense():
    class Hand(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.add_module(name, nn.Sequential(nn.Flatten(2), nn.Linear(64, 16)))
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
            self.out = nn.Linear(16, 5)

    for name in ("patch_embed", "to_patch_embedding", "patch_to_embed", "embed", "embeds", "patch_proj"):
        kept = linears.kept(Hand(name))
        assert kept == {f"{name}.1": "an embedding", "out": "the classifier"}


class Patched(nn.Module):
    """A linear of any name that sees patches, or something else than the image."""

    def __init__(self, net, cut):
        super().__init__()
        self.tokens, self.blocks, self.head, self.cut = nn.Linear(192, 32), net.blocks, nn.Linear(32, 5), cut
        self.norm = nn.LayerNorm(192)

    def forward(self, x):
        for block in [self.tokens, *self.blocks]:
            x = block(x if x.ndim < 4 else self.cut(self, x))
        return self.head(x.mean(1))


def patches(x):
    return x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def test_the_linear_that_embeds_patches_is_found_by_what_it_is_given(tiny_vit, batches):
    for cut in (lambda net, x: patches(x), lambda net, x: net.norm(patches(x))):
        model = Patched(tiny_vit(), cut).eval()
        stats = vitlr.calibrate(model, batches)
        assert "tokens" not in stats.layers and len(stats.layers) == 8
        small = vitlr.compress(model, batches, "params:60%", rank_step=4)
        assert type(small.tokens) is nn.Linear
    model = Patched(tiny_vit(), lambda net, x: patches(x)[:, :5]).eval()  # not all that the image holds
    assert "tokens" in vitlr.calibrate(model, batches).layers
