"""Images of folders, tars and data sets as loaders, and the classes of their labels."""

from vitlr.data.loader import Loader, data_config, open_data

__all__ = ["Loader", "data_config", "open_data"]
