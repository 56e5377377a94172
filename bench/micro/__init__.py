"""How fast single kernels and stages are, beside what they replace."""
