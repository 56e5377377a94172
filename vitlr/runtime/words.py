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


def four(value: float, decimals: int = 2) -> str:
    """A number of a table in four figures or so: `7146`, `582.7`, `13.57`, `0.85`, with at most so many decimals."""
    return f"{value:.{max(0, min(decimals, 4 - len(str(int(abs(value))))))}f}"


def newer(word: str, names: Mapping[str, str]) -> str:
    """The word that took the place of an old one, with a note, the first time; any other word as it is."""
    if word not in names:
        return word
    _note(word, names[word])
    return names[word]


@functools.cache
def _note(old: str, new: str) -> None:
    logging.getLogger("vitlr").warning("%r is called %r now; the old word is still understood", old, new)


def numbered(name: str) -> tuple[str, int | None]:
    """A dotted name without its last inner number, `blocks.*.mlp.fc1`, and the number; None where it has none."""
    parts = name.split(".")
    place = max((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), default=None)
    if place is None or len(parts[place]) > 6:
        return name, None
    return ".".join([*parts[:place], "*", *parts[place + 1 :]]), int(parts[place])


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def gathered(pattern: str, numbers: Sequence[int]) -> str:
    """One name for all of `numbered`: `blocks.{0-3,7}.mlp.fc1`."""
    return pattern.replace("*", f"{{{ranges(numbers)}}}" if len(numbers) > 1 else str(numbers[0]), 1)


def tail(name: str, longest: int) -> str:
    """A name, without its beginning where it is too long."""
    return name if len(name) <= longest else f"…{name[len(name) - longest + 1 :]}"
