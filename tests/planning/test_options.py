"""What a plan may choose: what goes together, what settles the method, and the words of before."""

import subprocess
import sys

import pytest

from vitlr.errors import InputError
from vitlr.planning.budgets import parse_budget
from vitlr.planning.options import Planning

BUDGET = parse_budget("params:60%")


def test_they_are_read_without_torch():
    code = "import sys, vitlr.planning.options; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "method", "hidden"),
    [
        ({}, None, True),
        ({"method": "lowrank"}, "lowrank", False),
        ({"ranks": {"x": 3}}, "lowrank", False),
        ({"objective": "normalized"}, "lowrank", False),
        ({"attention": "none"}, None, True),
        ({"attention": "heads"}, None, "attention"),
        ({"method": "prune", "attention": "scores"}, "widths", True),
        ({"method": "hybrid"}, "widths+ranks", True),
        ({"method": "joint", "attention": "channels"}, "joint", "attention"),
    ],
)
def test_options_settle_the_method_and_say_what_is_to_be_measured(options, method, hidden):
    planning = Planning(**options)
    assert (planning.settled, planning.hidden) == (method, hidden)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "scores"}, "unknown method 'scores', expected one of lowrank, widths"),
        ({"attention": "prune"}, "unknown attention 'prune', expected one of query_keys"),
        ({"objective": "best"}, "unknown objective 'best', expected one of fisher"),
        ({"prune_rate": 0.5}, "prune_rate= goes with .*; name one of them"),
        ({"uniform": True, "rank_buckets": 2}, "one rank a shape already"),
        ({"uniform": True, "attention": "heads"}, "not with method='lowrank'"),
        ({"centred": True, "objective": "fisher"}, "centred=True needs plain moments"),
        ({"ranks": {"x": 3}, "include": "x"}, "names the layers itself"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(options, said):
    with pytest.raises(InputError, match=said):
        Planning(**options)


def test_a_budget_is_needed_where_nothing_else_says_how_much():
    for options in ({}, {"method": "joint"}, {"method": "widths+ranks", "prune_rate": 0.3}):
        Planning(**options).check_budget(BUDGET)
        with pytest.raises(InputError, match="give a budget such as"):
            Planning(**options).check_budget(None)
    Planning(ranks={"x": 3}).check_budget(None)
    Planning(method="widths", prune_rate=0.3).check_budget(None)
    with pytest.raises(InputError, match="a budget or a prune_rate, not both"):
        Planning(method="widths", prune_rate=0.3).check_budget(BUDGET)
