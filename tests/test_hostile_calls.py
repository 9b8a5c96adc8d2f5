"""Whatever Python passes to the package, it gets an exception or a result: the process lives."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import hostile_calls
import pytest
import warm_process

SCRIPT = Path(hostile_calls.__file__)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """In a fresh process: its children are forked, and threads do not survive a fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = warm_process.run([str(SCRIPT)], env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("group", hostile_calls.GROUPS)
def test_every_call_is_answered(answers: dict[str, Any], group: str) -> None:
    faults = answers[group]["faults"]
    assert not faults, "\n".join(f"{call}: {fault}" for call, fault in faults.items())
    assert answers[group]["calls"] > 0
