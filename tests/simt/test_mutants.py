"""Planted bugs must be caught: the tests and the simulator, tested. `make mutants` has all."""

from __future__ import annotations

import pytest
import simulator
from cuda_mutants import MUTANTS, QUICK
from planting import Catch, Mutant, catch, table, with_bug
from rich.console import Console

RESULTS: list[tuple[Mutant, Catch | None]] = []

if simulator.missing():
    pytest.skip(str(simulator.missing()), allow_module_level=True)


@pytest.mark.parametrize("mutant", QUICK, ids=lambda m: m.bug)
def test_is_caught(mutant: Mutant) -> None:
    caught = catch(mutant)
    RESULTS.append((mutant, caught))
    assert caught, f"no test saw: {mutant.bug} ({mutant.file})"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.bug)
def test_can_be_planted(mutant: Mutant) -> None:
    with_bug(mutant)


def test_there_are_enough_of_every_kernel() -> None:
    assert len(MUTANTS) >= 25
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS)
    kernels = sorted((simulator.ROOT / "csrc/cuda/kernels").glob("*.cuh"))
    with_kernels = {f"csrc/cuda/kernels/{p.name}" for p in kernels if "__global__" in p.read_text()}
    assert with_kernels <= {mutant.file for mutant in MUTANTS}


@pytest.fixture(scope="module", autouse=True)
def _print_table(request: pytest.FixtureRequest):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=180).print(table(RESULTS))
