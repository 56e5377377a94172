"""The families of models that vitlr is tried on: small ones of random weights, by `library/family`.

Small where the library lets its user say so, else its smallest. The only list: `tests/families.py` counts the linears
of some, `bench/models.py` tries all.
"""

from __future__ import annotations

import importlib.util

from bench.families import by_hand, of_open_clip, of_timm, of_torchvision, of_transformers
from bench.families.family import Family

_LIBRARIES = {
    "timm": ("timm", of_timm),
    "transformers": ("transformers", of_transformers),
    "torchvision": ("torchvision", of_torchvision),
    "open_clip": ("open_clip", of_open_clip),
    "torch": ("by hand", by_hand),
}


def families() -> dict[str, Family]:
    """Those whose library is installed."""
    return {
        f"{called}/{name}": family
        for library, (called, of) in _LIBRARIES.items()
        if importlib.util.find_spec(library) is not None
        for name, family in of.families()
    }
