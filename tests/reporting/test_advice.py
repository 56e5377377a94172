"""What is advised: the smallest and the fastest within what may be lost, and honest words where there is none."""

from __future__ import annotations

import pytest

from vitlr.reporting.advice import advice, table, within
from vitlr.reporting.rows import DENSE, INT8, PLAIN, VITLR, Row


def row(name: str, kind: str, size: float, top1: float | None = 80.0, **more) -> Row:
    shares = {} if top1 is None else {"top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 2}
    return Row(name, kind, round(size * 1e6), 1300, **{"agreement": 99.0, "kl": 0.01, **shares, **more})


@pytest.fixture
def rows() -> list[Row]:
    return [
        row(DENSE, DENSE, 22.87, 82.6, ms=35.0, speedup=1.0),
        row("bytes:15%", VITLR, 3.39, 82.7, ms=40.0, speedup=0.9, method="bits", rounds_only=True),
        row("bytes:12%", VITLR, 2.8, 81.8, method="mix"),
        row("params:80%", VITLR, 18.3, 82.3, ms=28.0, speedup=1.25, method="joint"),
        row("int8 (fuse bits=8)", INT8, 6.0, 80.0, ms=20.0, speedup=1.75),
        row("plain int8", PLAIN, 5.9, 82.4),
        row("plain int4", PLAIN, 3.2, 81.2),
    ]


def test_the_smallest_the_plain_one_and_the_fastest_are_named(rows):
    said = advice(rows)
    assert said.startswith("At 0.5 points of top-1 lost the smallest is bytes:15%: 3.39 MB, top-1 82.7, which only ")
    assert "plain rounding alone: plain int8: 5.90 MB" in said and "the fastest is params:80%, 1.25 times" in said
    assert "\n" not in said


def test_more_points_allow_smaller_and_faster_ones(rows):
    said = advice(rows, 3)
    assert "smallest is bytes:12%: 2.80 MB" in said and "plain int4" in said and "int8 (fuse bits=8), 1.75" in said
    assert "only rounds" not in said
    assert "plain rounding alone: none" in advice(rows, 0.1) and "alone" not in advice(rows[:4])


def test_plain_rounding_is_advised_where_it_is_the_smallest(rows):
    said = advice([r for r in rows if not r.name.startswith("bytes")])
    assert "the smallest is plain int8" in said and "alone" not in said


def test_where_nothing_is_good_enough_the_best_is_named(rows):
    said = advice([rows[0], rows[2], rows[6]])
    assert "there is none; the best is bytes:12%: 2.80 MB, top-1 81.8" in said
    assert advice(rows[:1]) == "At 0.5 points of top-1 lost there is none. Larger budgets, or --refine, lose less."


def test_without_labels_agreement_counts_and_of_features_the_cosine(rows):
    unlabelled = [row(DENSE, DENSE, 20, None, agreement=100.0), row("bytes:9%", VITLR, 2, None, agreement=98.4)]
    assert "At 2 points of agreement lost the smallest is bytes:9%" in advice(unlabelled)
    assert within(unlabelled, 1) == []
    features = [Row(DENSE, DENSE, 20, 9, cosine=1.0), Row("bytes:9%", VITLR, 2, 9, cosine=0.992)]
    assert within(features) == features[1:] and within(features, 0.5) == []
    assert "cosine 0.9920" in advice(features)


def test_the_table_fits_eighty_columns_and_stands_by_size(rows):
    lines = table(rows).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split("  ")[0] for line in lines[1:4]] == ["dense", "params:80%", "int8 (fuse bits=8)"]
    assert "82.7 (80.7-84.7)" in table(rows) and " 1.25x" in table(rows) and "1300 images" in table(rows)
    unlabelled = table([row(DENSE, DENSE, 20, None), row("bytes:9%", VITLR, 2, None)])
    assert "top-1" not in unlabelled and "agree" in unlabelled
