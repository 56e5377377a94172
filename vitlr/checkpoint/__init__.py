"""One safetensors file that rebuilds itself."""

from typing import TYPE_CHECKING

from vitlr.runtime.lazy import lazily

if TYPE_CHECKING:
    from vitlr.checkpoint.files import load, save

__all__ = ["load", "save"]
__getattr__ = lazily(__name__, {"vitlr.checkpoint.files": ("load", "save")})
