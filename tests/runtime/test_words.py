"""Words and numbers that messages and tables are made of."""

from __future__ import annotations

import pytest

from vitlr.runtime.words import four


@pytest.mark.parametrize(
    ("value", "said"), [(7146.38, "7146"), (582.66, "582.7"), (13.567, "13.57"), (0.084, "0.08"), (123456.7, "123457")]
)
def test_numbers_of_tables_have_four_figures_or_so(value, said):
    assert four(value) == said


def test_fewer_decimals_may_be_asked_for():
    assert four(8.96, 1) == "9.0"
