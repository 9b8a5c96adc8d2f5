"""Which kernels have been executed: their mangled names, block sizes and shared memory.

Kept for the session in which they ran, and in a file beside the library for those after it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from driver import Launch


@dataclass
class KernelLaunches:
    """Of one kernel; dynamic shared memory in bytes, the least and the most of all launches."""

    kernel: str
    threads: int
    least_shared: int
    most_shared: int


@dataclass(frozen=True)
class Record:
    """Of one library: the test files that ran, and the kernels by their mangled names."""

    files: set[str]
    kernels: dict[str, KernelLaunches]
    library: Path


#: This session's, if a simulator was loaded in it.
SESSION: list[Record] = []


def begin(library: Path) -> None:
    SESSION.append(Record(set(), {}, library))


def add(test_file: str, launches: list[Launch]) -> None:
    record = SESSION[-1]
    record.files.add(test_file)
    for launch in launches:
        threads = math.prod(launch.block)
        known = record.kernels.setdefault(
            launch.mangled, KernelLaunches(launch.kernel, threads, launch.shared, launch.shared)
        )
        known.threads = max(known.threads, threads)
        known.least_shared = min(known.least_shared, launch.shared)
        known.most_shared = max(known.most_shared, launch.shared)


def _path(library: Path) -> Path:
    return library.with_suffix(".launches.json")


def save() -> None:
    record = SESSION[-1]
    kernels = {name: asdict(kernel) for name, kernel in record.kernels.items()}
    text = json.dumps({"files": sorted(record.files), "kernels": kernels}, indent=1)
    _path(record.library).write_text(text)


def load(library: Path) -> Record:
    """This session's record, or that of an earlier one with the same library."""
    if SESSION:
        return SESSION[-1]
    if not _path(library).exists():
        return Record(set(), {}, library)
    stored = json.loads(_path(library).read_text())
    kernels = {name: KernelLaunches(**numbers) for name, numbers in stored["kernels"].items()}
    return Record(set(stored["files"]), kernels, library)
