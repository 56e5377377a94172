"""What produces the figures of docs/measured.md, and the gate that every kernel has to pass."""
