"""A model of transformers: compressed, saved, loaded into a dense one, and given back to transformers.

python examples/transformers_vit.py google/vit-base-patch16-224 images
"""

from pathlib import Path

import typer
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vitlr
from vitlr.data import open_data


def main(name: str, images: str, budget: str = "params:80%", out: Path = Path("vit")) -> None:
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    processor = AutoImageProcessor.from_pretrained(name)
    loader = open_data(images, model, data_config=processor, limit=1000)

    small = vitlr.compress(model, loader, budget)  # an nn.Module that takes and gives what it did before
    out.mkdir(exist_ok=True)
    vitlr.save(small, out / "small.safetensors")
    small = vitlr.load(out / "small.safetensors", model=model)  # of the same architecture, whatever its weights
    print(vitlr.evaluate(small, loader, reference=model))

    vitlr.to_dense(small, full_width=True).save_pretrained(out)  # zeros for what is gone, for from_pretrained alone
    print(f"{out}: small.safetensors for vitlr.load, and a folder for from_pretrained")


if __name__ == "__main__":
    typer.run(main)
