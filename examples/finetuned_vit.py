"""Your fine-tuned ViT on your folder, end to end: compress, judge, pass on.

    python examples/finetuned_vit.py vit_tiny_patch16_224 weights.safetensors train val

`train` and `val` hold a folder of images a class, named as in fine-tuning; training uses none of the labels.
"""

from pathlib import Path

import typer

import vitlr
from vitlr.data import open_data


def main(
    name: str, checkpoint: Path, train: str, val: str, budget: str = "bytes:15%", out: Path = Path("small")
) -> None:
    classes = sum(path.is_dir() for path in Path(train).iterdir())
    model = vitlr.create_model(name, checkpoint=checkpoint, num_classes=classes)

    judge = open_data(val, model, need_labels=True)  # first: a folder of other classes is refused before the work
    small = vitlr.compress(model, open_data(train, model, limit=1000), budget)
    metrics = vitlr.evaluate(small, judge, reference=model)
    print("dense:", vitlr.evaluate(model, judge))
    print("small:", metrics)

    vitlr.save_pretrained(small, out, metrics=metrics)  # weights, config.json and a model card
    size = (out / "model.safetensors").stat().st_size
    print(
        f"{out}: {size / 1e6:.2f} of {checkpoint.stat().st_size / 1e6:.2f} MB, opened by vitlr.load('local-dir:{out}')"
    )


if __name__ == "__main__":
    typer.run(main)
