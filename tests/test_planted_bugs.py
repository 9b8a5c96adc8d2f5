"""Bugs can be planted where they are said to be: ``make mutants`` plants them."""

from __future__ import annotations

from mutant_copy import ROOT, with_bug
from mutants import MUTANTS


def test_each_is_planted_by_one_change():
    """A source that is changed takes a bug's text along; tests that are moved are named anew."""
    wrong = []
    for mutant in MUTANTS:
        try:
            if with_bug(mutant) == (ROOT / mutant.file).read_text():
                wrong.append(f"{mutant.bug}: changes nothing")
        except LookupError as error:
            wrong.append(str(error))
        for name in mutant.tests.split():
            path, *test = name.partition("[")[0].split("::")
            if not (ROOT / path).exists() or any(t not in (ROOT / path).read_text() for t in test):
                wrong.append(f"{mutant.bug}: there is no {name}")
    assert not wrong, "\n".join(wrong)


def test_each_has_a_name_of_its_own():
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS) >= 110
