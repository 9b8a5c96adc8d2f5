"""A copy of the sources, in which bugs of the CPU's kernels and of Python are planted in turn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mutant import Mutant
from pytest_process import warm

ROOT = Path(__file__).resolve().parent.parent
#: Most of a mutant's time is the compiler's, and kernels of small tests need not be fast. What the
#: wider instruction sets extend is compiled as it is elsewhere, so that ccache has it.
FLAGS = {"portable": "-O1"}


class Copy:
    """The sources in a folder of their own.

    Args:
        folder: It must not exist.
        isa: The instruction set that is compiled, with those that it extends, and that the tests
            run on; None takes the extension of this checkout as it is, for bugs in Python.
    """

    def __init__(self, folder: Path, isa: str | None) -> None:
        self.folder, self.isa = folder, isa
        self._writes = 0
        ignored = [] if isa is None else ["*.so"]
        ignore = shutil.ignore_patterns(*ignored, "build", ".*", "*.egg-info")
        shutil.copytree(ROOT, folder, ignore=ignore)

    def build(self) -> None:
        """Compiles what has changed, and what it is included in.

        Raises:
            RuntimeError: The compiler has an error.
        """
        if self.isa is None:
            return
        variables = {
            "FUSED_RESNET_ISAS": self.isa,
            "FUSED_RESNET_CUDA": "0",
            "CFLAGS": FLAGS.get(self.isa, ""),
        }
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.folder,
            env={**os.environ, **variables, "CCACHE_BASEDIR": str(self.folder)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"does not compile\n{done.stderr[-2000:]}")

    def first_failure(self, tests: Sequence[str]) -> str | None:
        """The first test that fails, or None.

        Args:
            tests: Paths of files and ids of tests, which run until one fails.

        Raises:
            RuntimeError: The tests cannot be run at all.
        """
        options = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "--backend", "cpu"]
        variables = {} if self.isa is None else {"FUSED_RESNET_ISA": self.isa}
        done = warm([*options, *tests], self.folder, variables)
        if done.status == 0:
            return None
        if done.violent_end:
            return done.violent_end
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.output, re.MULTILINE)
        if done.status != 1 or not failed:
            raise RuntimeError(f"pytest did not run {tests}\n{done.output[-4000:]}")
        return failed[0]

    def caught_by(self, mutant: Mutant) -> str | None:
        """The first test that fails with the bug in its place, or None when it lives."""
        with self._planted(mutant):
            self.build()
            return self.first_failure(mutant.tests.split())

    @contextmanager
    def _planted(self, mutant: Mutant) -> Iterator[None]:
        path, text = self.folder / mutant.file, with_bug(mutant)
        original = path.read_text()
        self._write(path, text)
        try:
            yield
        finally:
            self._write(path, original)

    def _write(self, path: Path, text: str) -> None:
        """Each time a second later, since Python tells a file's versions apart by that."""
        path.write_text(text)
        if path.suffix == ".py":
            self._writes += 1
            at = path.stat().st_mtime + self._writes
            os.utime(path, (at, at))


def with_bug(mutant: Mutant) -> str:
    """The text of the mutant's file.

    Raises:
        LookupError: The text to replace is not there, or more than once.
    """
    text = (ROOT / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise LookupError(f"{mutant.bug}: {mutant.file} has {mutant.old!r} {count} times, not once")
    return text.replace(mutant.old, mutant.new)
