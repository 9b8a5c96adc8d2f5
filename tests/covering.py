"""Covering sets: few combinations of many parameters' values, chosen by a rule, never at random.

Most faults need two values to meet (a shape and a memory format, a format and a dtype), few need
three. A covering set therefore has every pair of values, in far fewer rows than the full product.
Where three parameters do decide together which code runs, they are said to be `every`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(
    every: Mapping[str, Sequence[Any]], spread: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Rows with each combination of the values in ``every``, and each pair of any two values.

    Args:
        every: Parameters whose full product is taken, as name to values.
        spread: Parameters whose values are spread over these rows; rows are added for the pairs
            that are still missing at the end.
    """
    parameters = {**every, **spread}
    wanted = {
        frozenset([(a, i), (b, j)])
        for a, b in combinations(parameters, 2)
        if a in spread or b in spread
        for i, j in product(range(len(parameters[a])), range(len(parameters[b])))
    }
    starts = [dict(zip(every, at, strict=True)) for at in product(*_indices(every.values()))]
    rows = []
    if every or not spread:  # without any parameter there is one row, and it is empty
        rows = [_completed(row, spread, wanted) for row in starts]
    else:
        wanted |= {frozenset([(name, i)]) for name in spread for i in range(len(spread[name]))}
    while wanted:
        first = min(wanted, key=lambda pair: sorted(pair))
        rows.append(_completed(dict(first), parameters, wanted))
    return [{name: parameters[name][row[name]] for name in parameters} for row in rows]


def _indices(values: Iterable[Sequence[Any]]) -> list[range]:
    return [range(len(v)) for v in values]


def _completed(
    row: dict[str, int], parameters: Mapping[str, Sequence[Any]], wanted: set[frozenset]
) -> dict[str, int]:
    """The row with a value for each parameter, whichever makes the most pairs that are new.

    Of equal ones the one that comes next after those of the rows before, so that values alternate.
    """
    for name, values in parameters.items():
        if name in row:
            continue

        def new(i: int, name: str = name) -> int:
            return sum(frozenset([(name, i), other]) in wanted for other in row.items())

        turn = len(wanted)
        row[name] = max(range(len(values)), key=lambda i: (new(i), -((i - turn) % len(values))))
    wanted -= {frozenset(pair) for pair in combinations(row.items(), 2)}
    wanted -= {frozenset([one]) for one in row.items()}
    return row


Values = Mapping[str, Any] | Sequence[Any]


def cover(every: Mapping[str, Values] | None = None, /, **spread: Values) -> pytest.MarkDecorator:
    """Parametrises a test by a covering set of the values, which are lists or label to value.

    Args:
        every: Parameters of which all combinations occur.
        **spread: The others.
    """
    every = every or {}
    rows = covering(
        *({name: labelled(values) for name, values in some.items()} for some in (every, spread))
    )
    params = [
        pytest.param(*(v for _, v in row.values()), id="-".join(label for label, _ in row.values()))
        for row in rows
    ]
    return pytest.mark.parametrize((*every, *spread), params)


def labelled(values: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    """Values with the labels that they have in a test's id."""
    if isinstance(values, Mapping):
        return list(values.items())
    return [(str(v).removeprefix("torch."), v) for v in values]
