"""A plan as people read it: eighty columns, every reason said, what is left alone summed up."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from vitlr.planning.plans import LayerPlan, Plan, WidthPlan
from vitlr.planning.tables import letter
from vitlr.runtime.words import gathered, numbered, ranges, tail

AGAIN, SAVES = "dense: worth its cost within the budget", "saves most for its error"


def plan(depth: int, changed: tuple[int, ...] = (), name: str = "blocks.{}.mlp.fc1") -> Plan:
    layers = []
    for i in range(depth):
        rank, reason = (16, SAVES) if i in changed else (None, AGAIN)
        layers.append(LayerPlan(name.format(i), 192, 768, rank, 197.0, 0.5 * i, reason))
    totals = dict.fromkeys(("params", "macs", "bytes"), 10**7) | dict.fromkeys(
        ("params_kept", "macs_kept", "bytes_kept"), 6 * 10**6
    )
    return Plan("params:60%", "fisher", False, 0.0, tuple(layers), "f", method="joint", **totals)


def test_what_is_left_alone_is_summed_up_where_there_is_much():
    lines = str(plan(30, changed=(4, 5))).splitlines()
    assert lines[1].split() == ["blocks.{0-3,6-29}.mlp.fc1", "768x192", "dense", "213", "4,128,768", "a"]
    assert [line.split()[0] for line in lines[2:4]] == ["blocks.4.mlp.fc1", "blocks.5.mlp.fc1"]
    assert f"  a  28 x {AGAIN}" in lines and f"  b  2 x {SAVES}" in lines


def test_a_short_plan_shows_every_layer():
    text = str(plan(5, changed=(1,)))
    assert all(f"blocks.{i}.mlp.fc1 " in text for i in range(5)) and "{" not in text


def test_no_reason_is_lost_and_every_row_names_its_own():
    one = plan(30, changed=(4,))
    some = replace(one, layers=tuple(replace(row, reason=f"reason {i}") for i, row in enumerate(one.layers)))
    text = str(some)
    reasons = dict(re.findall(r"^  (\w+)  1 x (.+)$", text, re.MULTILINE))
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.startswith("blocks.")}
    assert {reasons[rows[row.name]] for row in some.layers} == {f"reason {i}" for i in range(30)}


@pytest.mark.parametrize(
    "name", ["blocks.{}.mlp.fc1", "vision_model.encoder.layers.{}.attention.attention.query", "x" * 99 + ".{}.y"]
)
@pytest.mark.parametrize("rounded", [False, True])
def test_tables_have_eighty_columns(name, rounded):
    found = plan(30, changed=(0, 3), name=name)
    if rounded:
        found = replace(found, layers=tuple(replace(row, level=-96, bits=3.25) for row in found.layers))
    found = replace(found, widths=(WidthPlan("blocks.3.mlp", 3072, 1024, 1e-9, SAVES * 5),))
    assert max(map(len, str(found).splitlines())) <= 80 and "1024/3072" in str(found)


def test_names_that_differ_in_one_number_become_one():
    assert numbered("layers.2.blocks.5.mlp.fc1") == ("layers.2.blocks.*.mlp.fc1", 5)
    assert numbered("head") == ("head", None) and numbered("mlp.0") == ("mlp.0", None)
    assert ranges([3, 0, 1, 2, 7]) == "0-3,7" and ranges([4]) == "4"
    assert gathered("blocks.*.mlp", [0, 1, 5]) == "blocks.{0-1,5}.mlp" and gathered("b.*.c", [5]) == "b.5.c"
    assert tail("abcdef", 4) == "…def" and tail("abc", 4) == "abc"
    assert [letter(i) for i in (0, 25, 26, 27, 52)] == ["a", "z", "aa", "ab", "ba"]
