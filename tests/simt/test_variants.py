"""The operators' small awkward shapes again: other schedules, ASan and UBSan, the race checker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import simulator
from pytest_process import new_process, warm

HERE = Path(__file__).resolve().parent

if simulator.missing():
    pytest.skip(str(simulator.missing()), allow_module_level=True)


@pytest.mark.parametrize(
    ("variant", "seed"),
    [("plain", 1), ("asan", 0), ("race", 0)]
    + [
        pytest.param(v, s, marks=pytest.mark.slow)
        for v, s in [("plain", 2), ("asan", 1), ("race", 1), ("race", 2)]
    ],
)
def test_operators(variant: str, seed: int) -> None:
    variables = {"FR_SIMT_VARIANT": variant, "FR_SIMT_SEED": str(seed)}
    # Built here: under AddressSanitizer the compiler would be checked too.
    variables["FR_SIMT_LIBRARY"] = str(simulator.build(variant))
    run = warm
    if variant == "asan":
        variables |= simulator.sanitizer_environment()
        run = new_process  # whose runtime is there from the beginning
    arguments = ["-q", "-x", "-p", "no:cacheprovider"]
    arguments += ["--capture=sys"]  # what a sanitizer says as the process ends is seen
    arguments += ["-m", "variants and not slow", "--backend", "simulator"]
    arguments += [str(HERE), str(HERE.parent / "conformance")]
    done = run(arguments, HERE.parent.parent, variables)
    assert done.status == 0, done.output[-12000:]
    passed = re.search(r"(\d+) passed", done.output)
    assert passed, done.output
    assert int(passed[1]) > 20, "few operators' tests are marked `variants`"
