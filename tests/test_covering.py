"""The rule by which tests choose a few of many combinations."""

from __future__ import annotations

from itertools import combinations, product

from covering import covering

EVERY = {"shape": ["a", "b", "c"], "training": [False, True]}
SPREAD = {"dtype": ["half", "float32", "float64"], "relu": [False, True]}


def test_all_combinations_of_some_and_all_pairs_of_the_rest():
    rows = covering(EVERY, SPREAD)
    values = EVERY | SPREAD
    assert {(r["shape"], r["training"]) for r in rows} == set(product(*EVERY.values()))
    for one, other in combinations(values, 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(product(values[one], values[other])), (one, other)
    assert len(rows) < len(list(product(*values.values()))) / 2
    assert rows == covering(EVERY, SPREAD)


def test_pairs_alone():
    rows = covering({}, SPREAD)
    assert {(r["dtype"], r["relu"]) for r in rows} == set(product(*SPREAD.values()))
    assert [row["relu"] for row in covering({}, {"relu": [False, True]})] == [False, True]


def test_without_parameters_there_is_one_row():
    assert covering({}, {}) == [{}]
