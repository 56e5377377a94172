"""Options as values: what a field takes, what it refuses and in which words, and where its name shows."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest

from vitlr.errors import InputError
from vitlr.planning.options import Planning
from vitlr.refinement.recipe import parse_rungs
from vitlr.runtime import words
from vitlr.runtime.fields import Options, check_names, declared, keywords, names_of, option, own


@dataclass(frozen=True)
class Sample(Options):
    """One field of every sort."""

    count: int = option(4, "How many.", low=1, metavar="N")
    few: int | None = option(None, "How many at most.", low=1, high=8)
    share: float = option(0.5, "A share.", above=0, below=1, was="part")
    rate: float = option(0.0, "A rate.", low=0)
    on: bool = option(True, "Whether.")
    kind: str = option("new", "Which.", among=("new", "other"), words={"old": "new"}, flag="--sort")
    names: str | Sequence[str] | None = option(None, "Whose.", flag="")

    def check(self) -> None:
        if self.kind == "other" and not self.on:
            raise InputError("kind='other' goes with on=True")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count=0, expected a whole number from 1 on"),
        ({"count": 2.0}, "count=2.0, expected a whole number"),
        ({"count": True}, "count=True, expected a whole number"),
        ({"count": None}, "count=None, expected a whole number"),
        ({"few": 9}, "few=9, expected a whole number from 1 to 8"),
        ({"share": 1.0}, "share=1.0, expected a number between 0 and 1"),
        ({"share": "half"}, "share='half', expected a number"),
        ({"rate": math.nan}, "rate=nan, expected a number from 0 on"),
        ({"rate": math.inf}, "rate=inf, expected a number from 0 on"),
        ({"rate": True}, "rate=True, expected a number"),
        ({"on": 1}, "on=1, expected True or False"),
        ({"kind": "none"}, "unknown kind 'none', expected one of new, other"),
        ({"kind": 3}, "unknown kind 3, expected one of new, other"),
        ({"kind": "other", "on": False}, "kind='other' goes with on=True"),
        ({"cout": 3}, "unknown option 'cout', expected some of count, few, share"),
    ],
)
def test_what_a_field_does_not_take_is_refused_in_one_sentence(given, said):
    with pytest.raises(InputError) as refused:
        Sample.of(**given)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_values_come_out_as_their_type():
    found = Sample.of(count=np.int64(3), share=np.float32(0.25), rate=2, names=["a"])
    assert (type(found.count), type(found.share), type(found.rate)) == (int, float, float)
    assert found.names == ["a"] and found.few is None and Sample(few=8).few == 8


def test_old_words_and_old_names_are_taken_and_not_shown():
    found = Sample.of(kind="old", part=0.25)
    assert (found.kind, found.share) == ("new", 0.25)
    assert "part" not in names_of(Sample) and "old" not in declared(Sample)["kind"].expected("word")
    assert own(Sample, {"part": 0.1, "other": 2}) == {"share": 0.1}


def test_changes_are_made_to_a_copy():
    before = Sample(count=2)
    after = Sample.of(before, rate=3)
    assert (after.count, after.rate, before.rate) == (2, 3.0, 0.0) and Sample.of(before) == before
    with pytest.raises(FrozenInstanceError):
        before.count = 5


@dataclass(frozen=True)
class Second(Options):
    """Shares a name with the first."""

    count: int = option(7, "Of others.")
    more: int = option(1, "More.")


def test_the_first_class_to_declare_a_name_says_it():
    assert (
        declared(Sample, Second)["count"].help == "How many." and declared(Second, Sample)["count"].help == "Of others."
    )
    check_names({"more": 1, "part": 2, "own": 3}, Sample, Second, more=("own",))
    with pytest.raises(InputError, match=r"unknown option 'mine', expected some of count, .*more, own"):
        check_names({"mine": 1}, Sample, Second, more=("own",))


def test_a_function_names_the_options_that_it_takes():
    @keywords(Sample, Second)
    def run(model, *, rate: float = 1.0, **changes):
        return changes

    shown = inspect.signature(run).parameters
    assert list(shown) == ["model", "rate", "count", "few", "share", "on", "kind", "names", "more"]
    assert shown["count"].default == 4 and shown["rate"].default == 1.0 and run(1, more=2) == {"more": 2}


def test_plain_values_are_json():
    assert Sample(names=("a", "b")).to_dict() == {
        "count": 4, "few": None, "share": 0.5, "rate": 0.0, "on": True, "kind": "new", "names": ["a", "b"]
    }  # fmt: skip


def test_an_old_word_is_understood_with_one_note(caplog):
    words._note.cache_clear()
    with caplog.at_level(logging.WARNING, "vitlr"):
        assert [Planning(method="prune").method for _ in range(2)] == ["widths", "widths"]
        assert parse_rungs("joint") == ("refit", "regrow", "distil")
    said = "is called {} now; the old word is still understood"
    assert caplog.messages == [f"'prune' {said.format(repr('widths'))}", f"'joint' {said.format(repr('distil'))}"]
