"""A layer that reads the same for all images, as the query of a class token does, is rounded like any other."""

import torch
from torch import nn

import vitlr
from vitlr.measuring import cost


class ClassToken(nn.Module):
    """q reads a learnt token only, k and v read the image."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.q, self.kv, self.proj = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)

    def forward(self, x):
        q = self.q(self.token.expand(len(x), 1, -1))
        k, v = self.kv(x).chunk(2, -1)
        return self.proj((q @ k.mT / 24**0.5).softmax(-1) @ v)[:, 0]


def test_a_layer_whose_input_never_changes_is_rounded_and_its_bias_makes_up_for_all_of_it():
    torch.manual_seed(0)
    model, x = ClassToken().eval(), torch.randn(64, 9, 24)
    stats = vitlr.calibrate(model, x.split(16), extras=("rounding",))
    plan = vitlr.plan(model, stats, "bytes:40%", method="bits")
    small = vitlr.apply(model, plan)
    assert "q" in plan.levels and cost.count_bytes(small) <= 0.4 * cost.count_bytes(model)
    with torch.no_grad():
        q, rounded = model.q(model.token), small.q(model.token)
        torch.testing.assert_close(rounded, q, rtol=1e-4, atol=1e-4 * float(q.abs().max()))
        assert (small(x) - model(x)).norm() < 0.1 * model(x).norm()
