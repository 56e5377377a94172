"""Images of folders, tars and data sets as loaders, and the classes of their labels."""

from typing import TYPE_CHECKING

from vitlr.runtime.lazy import lazily

if TYPE_CHECKING:
    from vitlr.data.loader import Loader, open_data
    from vitlr.data.preprocessing import data_config

__all__ = ["Loader", "data_config", "open_data"]
__getattr__ = lazily(
    __name__, {"vitlr.data.loader": ("Loader", "open_data"), "vitlr.data.preprocessing": ("data_config",)}
)
