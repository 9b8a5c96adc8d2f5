"""Planted bugs must be caught: the tests and the interpreter, tested. `make mutants` has all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console
from triton_mutants import KERNELS, MUTANTS, ROOT, Catch, Mutant, catch, table

RESULTS: list[tuple[Mutant, Catch | None]] = []


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.quick], ids=lambda m: m.bug)
def test_is_caught(mutant: Mutant) -> None:
    caught = catch(mutant)
    RESULTS.append((mutant, caught))
    assert caught, f"no test saw: {mutant.bug} ({mutant.file})"


def test_each_can_be_planted() -> None:
    for mutant in MUTANTS:
        assert (ROOT / KERNELS / mutant.file).read_text().count(mutant.old) == 1, mutant.bug


def test_there_are_some_of_every_file_with_kernels() -> None:
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS) >= 12
    files = sorted((ROOT / KERNELS).glob("*.py"))
    with_kernels = {path.name for path in files if "@triton.jit" in path.read_text()}
    assert with_kernels <= {mutant.file for mutant in MUTANTS}


@pytest.fixture(scope="module", autouse=True)
def _print_table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=180).print(table(RESULTS))
