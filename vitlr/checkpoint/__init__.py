"""One safetensors file that rebuilds itself."""

from vitlr.checkpoint.files import load, save

__all__ = ["load", "save"]
