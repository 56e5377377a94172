"""Accuracy against milliseconds: what a user could run instead, and what vitlr runs."""
