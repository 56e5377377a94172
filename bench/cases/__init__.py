"""Calls and shapes that benchmarks and the gate share, how they are checked and how they are timed."""
