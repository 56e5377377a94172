"""A plan to a model: modules swapped, narrowed, fused, and put back."""
