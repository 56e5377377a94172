"""MLPs inside larger forwards are found, and only those whose neurons nothing else reads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitlr.anatomy.mlps import find_mlps, read_mlp
from vitlr.anatomy.visibility import visible
from vitlr.errors import InputError
from vitlr.surgery.mlps import narrow_mlp


class Block(nn.Module):
    """Attention and MLP written out in one forward, as many write it by hand."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def encoder_layer(**how):
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **how)


@pytest.mark.parametrize("make", [Block, encoder_layer, lambda: encoder_layer(activation="gelu", norm_first=True)])
def test_an_mlp_beside_an_attention_in_one_forward_can_lose_neurons(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), make()).double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad(), visible(model):
        mlps = find_mlps(model)
        assert list(mlps) == ["0", "1"] and all(mlp.width == 16 for mlp in mlps.values())
        for mlp in mlps.values():
            mlp.fc2.weight[:, ::3] = 0
        before = model(x)
        for mlp in mlps.values():
            narrow_mlp(mlp, torch.tensor([j for j in range(16) if j % 3]))
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


class Twice(Block):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h) + self.fc2(F.gelu(x.repeat(1, 1, 2)))


class Read(Block):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h)) + h.mean(-1, keepdim=True)


class Shared(Block):
    def forward(self, x):
        h = F.gelu(self.fc1(x))
        return self.fc2(h) + self.to_out(h[..., :8])


class SideBySide(Block):
    def __init__(self):
        super().__init__()
        self.fc3, self.fc4 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x))) + self.fc4(F.gelu(self.fc3(x)))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (Twice, "go through add"),
        (Read, "go through mean"),
        (Shared, "go through getitem"),
        (SideBySide, "2 of them side by side"),
    ],
)
def test_neurons_that_something_else_reads_stay(kind, word):
    with pytest.raises(InputError, match=word):
        read_mlp(kind())
    assert not find_mlps(nn.Sequential(kind()))
