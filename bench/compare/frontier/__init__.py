"""Accuracy against bytes of the file: what a user could do instead, and what vitlr does."""
