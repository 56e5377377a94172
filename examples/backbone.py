"""A timm ViT as back-bone: compressed, it still hands out the features of its blocks, as detectors take them.

python examples/backbone.py vit_tiny_patch16_224 images
"""

import typer
from torch import no_grad
from torch.nn.functional import cosine_similarity

import vitlr
from vitlr.data import open_data


@no_grad()
def main(name: str, images: str, budget: str = "params:80%", pretrained: bool = True) -> None:
    model = vitlr.create_model(name, pretrained=pretrained, num_classes=0)
    loader = open_data(images, model, batch_size=8, limit=500)
    small = vitlr.fuse(vitlr.compress(model, loader, budget))  # fused: our kernels, where they are faster

    x = next(iter(loader))[0]
    blocks = len(model.blocks)
    levels = [blocks // 2 - 1, blocks - 1]
    dense, ours = (m.forward_intermediates(x, indices=levels, intermediates_only=True) for m in (model, small))
    for level, a, b in zip(levels, dense, ours, strict=True):
        print(
            f"block {level}: {list(b.shape)}, cosine {cosine_similarity(a, b, dim=1).mean():.3f} to the dense features"
        )


if __name__ == "__main__":
    typer.run(main)
