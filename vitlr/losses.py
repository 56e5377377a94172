"""The former place of `vitlr.measuring.losses`, kept for scripts that import from it."""

from vitlr.measuring.losses import divergence, is_logits, sampled_losses

__all__ = ["divergence", "is_logits", "sampled_losses"]
