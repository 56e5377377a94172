"""The image tower of CLIP, compressed by what counts: the zero-shot answer over your classes, no labels needed.

    python examples/clip_image_tower.py vit_base_patch16_clip_224.openai images text.safetensors

The file has `text` [C, D], the text tower's embedding of every class; without one the image features themselves count.
"""

from pathlib import Path

import typer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

import vitlr
from vitlr.data import open_data

SCALE = 100.0  # of CLIP's logits


def main(
    name: str,
    images: str,
    text: Path | None = None,
    budget: str = "bytes:20%",
    pretrained: bool = True,
    out: Path = Path("tower.safetensors"),
) -> None:
    model = vitlr.create_model(name, pretrained=pretrained)  # its head is the projection into the joint space
    classes = None if text is None else normalize(load_file(text)["text"], dim=-1)

    def answer(features: Tensor) -> Tensor:
        return features if classes is None else SCALE * normalize(features, dim=-1) @ classes.T

    loader = open_data(images, model, limit=1000)
    small = vitlr.compress(model, loader, budget, output_fn=answer)
    vitlr.save(small, out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    print(vitlr.evaluate(vitlr.load(out), loader, reference=model, output_fn=answer))


if __name__ == "__main__":
    typer.run(main)
