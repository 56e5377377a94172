"""What linears lose where they multiply bytes, in the unit of all other losses."""

from __future__ import annotations

from vitlr.anatomy.reading import Parts
from vitlr.calibration.options import RANGES
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.byte_steps import byte_inputs


def nats_of_bytes(parts: Parts, stats: Statistics) -> dict[str, float]:
    """The loss of every linear on an image, nats where gradients were measured; none where ranges were not.

    What a token loses comes from sums of squared gradients `g`; the loss of an image is `½ E[(gᵀδ)²]` over its tokens,
    whose errors do not depend on each other.
    """
    if RANGES not in stats.extras:
        return {}
    found = {}
    inputs = byte_inputs(parts.linears, stats.layers)
    for name, layer in stats.layers.items():
        half = 1.0 if "gradient" not in layer.held else 2.0 * stats.samples
        found[name] = inputs[name].cost * layer.tokens / max(stats.images, 1) / half
    return found
