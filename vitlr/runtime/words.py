"""What messages are made of: causes on one line, a few of many names."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(cause: BaseException, longest: int = 200) -> str:
    """What an error says, or its class where it says nothing, on one line of at most so many letters."""
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, with dots where there are more."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
