"""What a test sees of a simulator: launches, reports, schedules, operators."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; ``mangled`` is its name in a cubin too."""

    kernel: str
    mangled: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


class Runtime:
    """The simulator's own functions in one library."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fr_simt_take_launches.restype = ctypes.c_char_p
        self.library.fr_simt_take_reports.restype = ctypes.c_char_p
        self.launched: list[Launch] = []  # all that launches() has returned
        self.default_seed = seed
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Chooses the schedule: 0 is in order, every other number shuffles warps and lanes."""
        self.library.fr_simt_seed(ctypes.c_uint32(seed))

    def launches(self) -> list[Launch]:
        """Since the last call."""
        found = []
        for line in self.library.fr_simt_take_launches().decode().splitlines():
            kernel, mangled, grid, block, shared = line.split("\t")
            sizes = [tuple(map(int, numbers.split(","))) for numbers in (grid, block)]
            found.append(Launch(kernel, mangled, *sizes, int(shared)))  # type: ignore[arg-type]
        self.launched += found
        return found

    def reports(self) -> list[str]:
        """What was wrong since the last call, with addresses as lines of source."""
        lines = self.library.fr_simt_take_reports().decode().splitlines()
        return [re.sub(r"pc\+(0x[0-9a-f]+)", self._line_of, line) for line in lines]

    def check(self) -> None:
        """Fails if anything was wrong since the last call."""
        reports = self.reports()
        assert not reports, "the simulator reports: " + "\n".join(reports)

    def _line_of(self, match: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-s", "-e", str(self.path), match[1]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return match[0]
        # With what it was inlined into.
        return " < ".join(line.split()[0] for line in done.stdout.splitlines())


class Simt(Runtime):
    """The operators on the simulator."""

    def __init__(self, path: Path, variant: str, seed: int) -> None:
        torch.ops.load_library(str(path))
        super().__init__(path, seed)
        self.variant = variant
        self.ops: Any = torch.ops.fused_resnet_simt
