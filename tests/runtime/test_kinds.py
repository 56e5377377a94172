"""Kinds take what they say and nothing else, and a message names where it stood and stays short."""

import json

import pytest

from vitlr.errors import InputError
from vitlr.runtime.kinds import FLAG, NAME, NONE, PLAIN, among, check, number, read_json, text, tuple_of, whole

NAN, INF = float("nan"), float("inf")
FINE = [
    (whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, NAN]),
    (number(0), [0, 0.5, 1e300], [-1, NAN, INF, True, "0", 10**400]),
    (among("a", 1), ["a", 1], ["b", True, 1.0, []]),
    (tuple_of(whole(0), 1, 2), [[0], (1, 2)], [[], [1, 2, 3], [True], "1", {0: 1}]),
    (text(3), ["", "abc"], ["abcd", "a\n", "\ud800", b"a"]),
    (FLAG, [True, False], [0, 1, None]),
    (whole(1) | NONE, [1, None], [0, False]),
    ([NAME], [[], ["a"]], ["a", [1], {"a": 1}, None]),
    ({"a": NAME, "b?": NAME}, [{"a": ""}, {"a": "", "b": ""}], [{}, {"a": 1}, {"a": "", "c": ""}, {1: ""}, [], "a"]),
    ({"*": whole(0)}, [{}, {"x": 0}], [{"x": -1}, {"\ud800": 1}, {3: 1}]),
    (PLAIN, [None, [{"a": [1.5, "x"]}]], [object(), [b"x"]]),
]


@pytest.mark.parametrize("spec, fine, wrong", FINE, ids=[str(index) for index in range(len(FINE))])
def test_a_kind_takes_what_it_says_and_nothing_else(spec, fine, wrong):
    for value in fine:
        check(value, spec, "it")
    for value in wrong:
        with pytest.raises(InputError, match="it"):
            check(value, spec, "it")


def test_messages_name_the_place_and_stay_short():
    with pytest.raises(
        InputError, match=r"plan rows\[1\] rank 'x.*, expected a whole number from 1 on or null"
    ) as told:
        check({"rows": [{"rank": 1}, {"rank": "x" * 10**6}]}, {"rows": [{"rank": whole(1) | NONE}]}, "plan")
    assert len(str(told.value)) < 250
    with pytest.raises(InputError) as told:
        check({"a" * 500: [[list(range(10**5))] * 100] * 100}, {"*": NAME}, "it")
    assert len(str(told.value)) < 1500


def test_json_that_is_deep_is_refused_whoever_reads_it():
    assert read_json('{"a": [1, null, Infinity]}')["a"][:2] == [1, None]
    for source in ("[" * 200_000, "[" * 40 + "]" * 40, '{"a":' * 900 + "1" + "}" * 900, "{", "1" * 5000):
        with pytest.raises(ValueError):
            read_json(source)
    json.dumps(read_json("[" * 30 + "]" * 30))
