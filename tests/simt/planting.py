"""Plants a bug in a copy of CUDA's sources and sees which build of the simulator catches it."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import simulator
from pytest_process import new_process, warm
from rich.table import Table

ROOT = simulator.ROOT
COPIED = ("csrc", "tests/simt/include", "tests/simt/runtime", "tests/simt/bindings.cpp")


@dataclass(frozen=True)
class Mutant:
    """A bug: in ``file``, ``old`` becomes ``new``.

    One of ``variants``, in this order, must see it in ``tests``; under asan and race only tests
    marked `variants` run.
    """

    bug: str
    file: str
    old: str
    new: str
    tests: str
    variants: tuple[str, ...] = ("plain",)


@dataclass(frozen=True)
class Catch:
    """Which build and which test saw a bug, and what it said."""

    variant: str
    test: str
    words: str


def with_bug(mutant: Mutant) -> str:
    """The text of the mutant's file."""
    text = (ROOT / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise LookupError(f"{mutant.bug}: {mutant.file} has {mutant.old!r} {count} times, not once")
    return text.replace(mutant.old, mutant.new)


def plant(mutant: Mutant, root: Path) -> None:
    """Writes a copy of the sources with the bug into ``root``."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy(ROOT / name, root / name)
    (root / mutant.file).write_text(with_bug(mutant))


def watch(mutant: Mutant, variant: str, library: Path) -> Catch | None:
    """Runs the mutant's tests with a library that has the bug in it."""
    variables = {"FR_SIMT_LIBRARY": str(library), "FR_SIMT_VARIANT": variant}
    pytest = warm
    if variant == "asan":
        variables |= simulator.sanitizer_environment()
        pytest = new_process  # whose runtime is there from the beginning
    arguments = ["-x", "-v", "--tb=short", "-p", "no:cacheprovider", "--backend", "simulator"]
    arguments += ["--capture=sys"]  # what a sanitizer says as the process ends is seen
    arguments += [] if variant == "plain" else ["-m", "variants"]
    done = pytest([*arguments, *mutant.tests.split()], ROOT, variables)
    status, out = done.status, done.output
    if status == 0:
        return None
    if status in (2, 3, 4, 5):  # interrupted, internal error, usage error, no tests
        raise RuntimeError(f"{mutant.bug}: pytest did not run {mutant.tests}\n{out[-2000:]}")
    outcome = r"(?: (?:PASSED|FAILED|ERROR|SKIPPED)|\s*$|=)"
    started = re.findall(rf"^\S+\.py::(.*?){outcome}", out, re.MULTILINE)
    said = re.findall(r"^E   +(.*)|.*?(AddressSanitizer: .*|runtime error: .*)", out, re.MULTILINE)
    words = next((a or b for a, b in said if a or b), done.violent_end or f"exit code {status}")
    return Catch(variant, started[-1].strip() if started else "?", words)


def catch(mutant: Mutant) -> Catch | None:
    """Plants the bug, builds what changed, and says who sees it."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "tests" / "simt").mkdir(parents=True)
        plant(mutant, root)
        for variant in mutant.variants:
            library = simulator.build(variant, root, root / "objects")
            caught = watch(mutant, variant, library)
            if caught:
                return caught
    return None


def table(results: list[tuple[Mutant, Catch | None]]) -> Table:
    shown = Table("planted bug", "file", "caught by", "in", "which says", title="Mutants")
    for mutant, caught in results:
        name = mutant.file.removeprefix("csrc/cuda/")
        if caught is None:
            shown.add_row(mutant.bug, name, "[red]nothing[/]")
        else:
            shown.add_row(mutant.bug, name, caught.variant, caught.test, caught.words[:100])
    return shown
