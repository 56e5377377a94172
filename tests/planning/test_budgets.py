import pytest

from vitlr.errors import InputError
from vitlr.planning.budgets import parse_budget


@pytest.mark.parametrize(
    "text, quantity, amount, relative",
    [
        ("params:40%", "params", 0.4, True),
        ("params:2.5M", "params", 2.5e6, False),
        (" MACS: 1.2g", "macs", 1.2e9, False),
        ("macs:100%", "macs", 1.0, True),
        ("bytes:10MB", "bytes", 10e6, False),
        ("bytes:1.5MiB", "bytes", 1.5 * 2**20, False),
        ("bytes:512", "bytes", 512, False),
        ("params:.5k", "params", 500, False),
        ("params:3e6", "params", 3e6, False),
        ("latency:60%", "latency", 0.6, True),
        ("latency:12.5ms", "latency", 12.5, False),
        ("latency: 0.2 s", "latency", 200, False),
        ("latency:800us", "latency", 0.8, False),
    ],
)
def test_budgets_are_read(text, quantity, amount, relative):
    budget = parse_budget(text)
    assert (budget.quantity, budget.amount, budget.relative) == (quantity, pytest.approx(amount), relative)
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    ["", "40%", "params", "params:", "params:x", "params:0%", "params:101%", "params:-1", "params:nan", "params:1e400",
     "flops:40%", "latency:5", "latency:5MB", "latency:0.5", "params:5ms", "bytes:2s", "latency:0ms", "params:0.8",
     "macs:80", "params:10MB", "macs:1MiB", "params:40%%", "params:4 0%", "bytes:0"],
)  # fmt: skip
def test_others_are_refused_with_what_is_expected(text):
    with pytest.raises(InputError, match="budget"):
        parse_budget(text)
