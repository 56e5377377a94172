"""A real pretrained ViT on real images, where they are there: what the tiny random models cannot show."""

import vitlr
from vitlr.data.loader import open_data
from vitlr.decomposition.baselines import BASELINES


def test_loss_and_allocation_keep_what_plain_svd_loses(shared_data):
    """200 images to calibrate on, 100 others of that set to look at; validation images are for final figures only."""
    weights = shared_data("vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors")
    tar, synsets = shared_data("imagenet_calibration_1000.tar"), shared_data("imagenet_synsets.txt")
    model = vitlr.create_model("vit_tiny_patch16_224", checkpoint=weights)
    stats = vitlr.calibrate(model, open_data(tar, model, limit=200, batch_size=50))
    loader = open_data(tar, model, class_map=synsets, skip=200, limit=100, batch_size=50, need_labels=True)

    def kl(**options) -> float:
        plan = vitlr.plan(model, stats, "params:90%", rank_step=8, **options)
        found = vitlr.evaluate(vitlr.apply(model, plan), loader, model).kl
        assert found is not None
        return found

    svd, uniform, ours = kl(uniform=True, spectra=BASELINES["svd"](model, stats)), kl(uniform=True), kl()
    assert ours < 0.8 * uniform and uniform < 0.5 * svd, (svd, uniform, ours)
