"""Models as people write them by hand, on torch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from bench.families.family import Family

WIDTH, HIDDEN, CLASSES, PATCH, SIZE = 32, 64, 5, 8, 32


class Block(nn.Module):
    """Pre-norm, on `nn.MultiheadAttention` and an `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PlainBlock(nn.Module):
    """Pre-norm, everything written out: `to_qkv`, `F.scaled_dot_product_attention`, `to_out`, as vit-pytorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, some blocks, the mean of all tokens, a head."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = blocks
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch_embed(images).flatten(2).mT)).mean(1))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, 0.0, activation="gelu", norm_first=True, batch_first=True)
    return ViT(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


MODELS = {
    "nn.TransformerEncoder": _encoder,
    "nn.MultiheadAttention": lambda: ViT(nn.Sequential(Block(), Block())),
    "linears alone": lambda: ViT(nn.Sequential(PlainBlock(), PlainBlock())),
    "linears, behind nn.Sequential": lambda: nn.Sequential(
        ViT(nn.Sequential(PlainBlock(), PlainBlock())), nn.Softmax(-1)
    ),
}


def families() -> Iterator[tuple[str, Family]]:
    for name, build in MODELS.items():
        yield name, Family(build, (3, SIZE, SIZE))
