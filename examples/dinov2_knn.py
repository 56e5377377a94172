"""Features of DINOv2, judged by their nearest neighbours: what a smaller model costs where there is no head.

    python examples/dinov2_knn.py vit_small_patch14_dinov2.lvd142m train val

`train` and `val` hold a folder of images a class; labels are for judging only.
"""

import typer
from torch import Tensor, cat, nn, no_grad
from torch.nn.functional import normalize

import vitlr
from vitlr.data import open_data


@no_grad()
def features(model: nn.Module, loader) -> tuple[Tensor, Tensor]:
    """Unit features [n, D] and labels [n] of all images."""
    found = [(normalize(model(images), dim=-1), labels) for images, labels in loader]
    return cat([x for x, _ in found]), cat([y for _, y in found])


def nearest(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], k: int = 20) -> float:
    """The share of queries, in percent, whose label is the most frequent one among their k nearest in the bank."""
    (x, y), (q, wanted) = bank, queries
    found = y[(q @ x.T).topk(min(k, len(x)), dim=-1).indices].mode(dim=-1).values
    return 100 * (found == wanted).double().mean().item()


def main(name: str, train: str, val: str, budget: str = "bytes:15%", pretrained: bool = True) -> None:
    model = vitlr.create_model(name, pretrained=pretrained, num_classes=0)  # features, no head
    loaders = [open_data(place, model) for place in (train, val)]
    small = vitlr.compress(model, loaders[0], budget)

    banks = {"dense": [features(model, loader) for loader in loaders]}
    banks["small"] = [features(small, loader) for loader in loaders]
    for which, (bank, queries) in banks.items():
        print(f"{which}: {nearest(bank, queries):.1f} % of {len(queries[1])} images have the right neighbours")
    cosine = (banks["dense"][1][0] * banks["small"][1][0]).sum(-1).mean()
    print(f"cosine between both models' features: {cosine:.4f}")


if __name__ == "__main__":
    typer.run(main)
