"""Which kernels the small calls launch: their mangled names, block sizes and shared memory."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import simulator
from driver import Launch


@dataclass
class KernelLaunches:
    """Of one kernel; dynamic shared memory in bytes, the least and the most of all launches."""

    kernel: str
    threads: int
    least_shared: int
    most_shared: int


def by_kernel(launches: list[Launch]) -> dict[str, KernelLaunches]:
    """Launches by the mangled names of their kernels."""
    found: dict[str, KernelLaunches] = {}
    for launch in launches:
        threads = math.prod(launch.block)
        known = found.setdefault(
            launch.mangled, KernelLaunches(launch.kernel, threads, launch.shared, launch.shared)
        )
        known.threads = max(known.threads, threads)
        known.least_shared = min(known.least_shared, launch.shared)
        known.most_shared = max(known.most_shared, launch.shared)
    return found


@functools.cache
def of_small_calls() -> dict[str, KernelLaunches]:
    """What ``tests/gpu/small_calls.py`` launches in the simulator, in a process of its own."""
    program = simulator.ROOT / "tests" / "gpu" / "run_small_calls.py"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.json"
        command = [sys.executable, str(program), "launches", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        launches = [Launch(**launch) for launch in json.loads(path.read_text())]
    return by_kernel(launches)
