"""What calibration can be asked to measure; imports no torch, so that the shell reads it at once."""

from __future__ import annotations

OBJECTIVES = ("fisher", "loss", "output", "normalized")
DEFAULT = OBJECTIVES[0]  # nearest to the dense model at every budget tried (docs/results/ablate.md)
GRADIENT_OBJECTIVES = ("loss", "fisher")  # both need the moments of tokens
