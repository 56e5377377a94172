"""One calibration, many budgets: how the predicted error grows as less is kept, and which layers give way first."""

import argparse

import vitlr
from vitlr.data import open_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a timm model, such as vit_tiny_patch16_224")
    parser.add_argument("data", help="a folder of images, a .tar or hfds/NAME")
    parser.add_argument("--checkpoint", help="weights; timm's pretrained ones are fetched where it is left out")
    parser.add_argument("--images", type=int, default=512, help="how many to calibrate on")
    parser.add_argument("--budgets", nargs="+", default=[f"params:{share}%" for share in (90, 80, 70, 60, 50, 40)])
    given = parser.parse_args()

    model = vitlr.create_model(given.model, checkpoint=given.checkpoint, pretrained=given.checkpoint is None)
    stats = vitlr.calibrate(model, open_data(given.data, model, limit=given.images))
    spectra = None
    print(f"{'budget':<14}{'params':>12}{'MACs':>10}{'error':>10}   lowest share of its own break-even rank")
    for budget in given.budgets:
        plan = vitlr.plan(model, stats, budget, spectra=spectra)
        spectra = plan.spectra  # the only expensive step, done once
        shares = {row.name: row.params / (row.in_features * row.out_features) for row in plan.layers}
        least = min(shares, key=shares.__getitem__)
        print(
            f"{budget:<14}{plan.params_kept:>12,}{plan.macs_kept / 1e9:>9.3f}G{plan.error:>10.3g}"
            f"   {least} keeps {shares[least]:.0%}"
        )


if __name__ == "__main__":
    main()
