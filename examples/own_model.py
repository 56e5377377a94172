"""Compress a model that no library knows, on images of one's own: any nn.Module with nn.Linears will do."""

from pathlib import Path

import torch
from torch import nn

import vitlr


class Mixer(nn.Module):
    """A small MLP-Mixer for 32x32 images."""

    def __init__(self, width: int = 96, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.tokens = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, 16, width]
        for mix, block in zip(self.tokens, self.blocks, strict=True):
            x = x + mix(x.transpose(1, 2)).transpose(1, 2)
            x = x + block(x)
        return self.head(x.mean(1))


def main(path: Path = Path("mixer.safetensors")) -> None:
    torch.manual_seed(0)
    model = Mixer().eval()  # with trained weights, in real life
    images = torch.randn(64, 3, 32, 32)
    loader = images.split(16)  # anything that yields batches

    small = vitlr.compress(model, loader, "params:60%", exclude="tokens")  # mixing 16 tokens is cheap already
    vitlr.save(small, path)  # no registry knows Mixer, so the file holds the weights and what was swapped
    again = vitlr.load(path, model=Mixer())

    with torch.no_grad():
        print("the same logits after loading:", torch.equal(again(images), small(images)))
        print(f"largest change of a logit: {(small(images) - model(images)).abs().max():.3f}")
    for name, module in again.named_modules():
        if isinstance(module, vitlr.LowRankLinear):
            print(f"{name}: {module.in_features} -> {module.rank} -> {module.out_features}")


if __name__ == "__main__":
    main()
