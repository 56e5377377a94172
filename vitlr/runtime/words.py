"""What messages are made of: causes on one line, a few of many names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence


def one_line(cause: BaseException, longest: int = 200) -> str:
    """What an error says, or its class where it says nothing, on one line of at most so many letters."""
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, with dots where there are more."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def newer(word: str, names: Mapping[str, str]) -> str:
    """The word that took the place of an old one, with a note, the first time; any other word as it is."""
    if word not in names:
        return word
    _note(word, names[word])
    return names[word]


@functools.cache
def _note(old: str, new: str) -> None:
    logging.getLogger("vitlr").warning("%r is called %r now; the old word is still understood", old, new)
