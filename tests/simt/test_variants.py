"""The operators' small awkward shapes again: other schedules, ASan and UBSan, the race checker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulator

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
    env = {**os.environ, "FR_SIMT_VARIANT": variant, "FR_SIMT_SEED": str(seed)}
    # Built here: under AddressSanitizer the compiler would be checked too.
    env["FR_SIMT_LIBRARY"] = str(simulator.build(variant))
    if variant == "asan":
        env |= simulator.sanitizer_environment()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--capture=sys"]  # what a sanitizer says as the process ends is seen
    command += ["-m", "variants and not slow", "--backend", "simulator"]
    command += [str(HERE), str(HERE.parent / "conformance")]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 20, "few operators' tests are marked `variants`"
