"""Plants bugs, one at a time, and checks that a test fails: ``make mutants``.

``python tests/run_mutants.py [--kind KIND] [--record FILE] [words of a bug]``. A bug that no test
catches is a gap in the tests: it is printed at the end, and the exit code is 1. What was found is
recorded as it is found, so that a run that was interrupted goes on where it was. A bug is planted
again when its file or its tests have changed since.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[1:1] = [str(HERE / folder) for folder in ("simt", "triton_kernels")]

import cuda_mutants  # noqa: E402
import mutants  # noqa: E402
import planting  # noqa: E402
import simulator  # noqa: E402
import triton_mutants  # noqa: E402
from mutant_copy import Copy  # noqa: E402

#: Where the bugs are planted: in the CPU's C++, in Python, in CUDA's kernels and in Triton's.
KINDS = ("cpu", "python", "cuda", "triton")


class LazyCopy:
    """A copy of the sources that is made when it is needed.

    Args:
        isa: See :class:`mutant_copy.Copy`.
    """

    def __init__(self, isa: str | None) -> None:
        self._isa = isa

    @functools.cached_property
    def _copy(self) -> Copy:
        self._scratch = tempfile.TemporaryDirectory()
        return Copy(Path(self._scratch.name) / "copy", self._isa)

    def caught_by(self, mutant: Any) -> str | None:
        """See :meth:`mutant_copy.Copy.caught_by`."""
        return self._copy.caught_by(mutant)

    def check(self, tests: Iterable[str]) -> None:
        """Tests that caught bugs pass without one.

        Raises:
            RuntimeError: One of them does not.
        """
        self._copy.build()
        failed = self._copy.first_failure(sorted(set(tests)))
        if failed:
            raise RuntimeError(f"{self._isa}: {failed} fails without a bug")


@dataclass(frozen=True)
class Planting:
    """One bug to plant.

    Attributes:
        kind: One of :data:`KINDS`.
        mutant: What is planted.
        file: Path of the source, from the root.
        catch: Plants it; what caught it, or None.
        place: The copy in which it is planted, if it is in one.
    """

    kind: str
    mutant: Any
    file: str
    catch: Callable[[], str | None]
    place: LazyCopy | None = None

    @property
    def key(self) -> str:
        """Of the bug, of the text of its file and of those of its tests."""
        named = (ROOT / name.partition("::")[0] for name in self.mutant.tests.split())
        files = [ROOT / self.file, *filter(Path.is_file, named)]  # an id may have spaces
        texts = [file.read_bytes() for file in files]
        parts = [repr(self.mutant).encode(), *texts]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class Record:
    """What was caught by what, in a file of one JSON object a line.

    Args:
        path: It is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {row["key"]: row["caught"] for row in map(json.loads, lines)}

    def add(self, one: Planting, caught: str | None, seconds: float) -> None:
        """Writes one result."""
        key = one.key
        self.found[key] = caught
        row = {"key": key, "kind": one.kind, "bug": one.mutant.bug, "caught": caught}
        with self.path.open("a") as file:
            file.write(json.dumps({**row, "seconds": round(seconds, 1)}) + "\n")


def in_cpp_and_python(words: str) -> Iterator[Planting]:
    """One instruction set after another, and one file after another, for fewer compilations."""
    chosen = [m for m in mutants.MUTANTS if words in m.bug]
    chosen.sort(key=lambda m: (m.file.endswith(".py"), m.isa, m.file))
    supported = supported_isas()
    places = itertools.groupby(chosen, key=lambda m: None if m.file.endswith(".py") else m.isa)
    for isa, group in places:
        place = LazyCopy(isa)
        kind = "python" if isa is None else "cpu"
        for mutant in group:
            if isa is None or isa in supported:
                catch = functools.partial(place.caught_by, mutant)
                yield Planting(kind, mutant, mutant.file, catch, place)
            else:
                print(f"not planted, as this machine has no {isa}: {mutant.bug}")


def supported_isas() -> list[str]:
    """By a process of its own, as this one has no use for the package."""
    code = "import fused_resnet; print(*fused_resnet.build_info()['isa_supported'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def in_cuda(words: str) -> Iterator[Planting]:
    """In the simulator's builds."""
    if simulator.missing():
        print(f"none planted in CUDA's kernels: {simulator.missing()}")
        return
    for mutant in sorted(cuda_mutants.MUTANTS, key=lambda m: m.file):
        if words in mutant.bug:

            def catch(mutant: planting.Mutant = mutant) -> str | None:
                found = planting.catch(mutant)
                return f"{found.test} ({found.variant}): {found.words}"[:160] if found else None

            yield Planting("cuda", mutant, mutant.file, catch)


def in_triton(words: str) -> Iterator[Planting]:
    """In the interpreter."""
    for mutant in triton_mutants.MUTANTS:
        if words in mutant.bug:

            def catch(mutant: triton_mutants.Mutant = mutant) -> str | None:
                found = triton_mutants.catch(mutant)
                return f"{found.test}: {found.words}"[:160] if found else None

            yield Planting("triton", mutant, str(triton_mutants.KERNELS / mutant.file), catch)


def run(plantings: list[Planting], record: Record) -> dict[str, list[str | None]]:
    """Plants what is not recorded yet; for each kind, what caught its bugs."""
    results: dict[str, list[str | None]] = {kind: [] for kind in KINDS}
    for number, one in enumerate(plantings, 1):
        said, begun = "recorded: ", time.monotonic()
        if one.key not in record.found:
            caught = one.catch()
            seconds = time.monotonic() - begun
            record.add(one, caught, seconds)
            said = f"{seconds:.0f} s: "
        caught = record.found[one.key]
        results[one.kind].append(caught)
        print(f"[{number}/{len(plantings)}] {one.kind}: {one.mutant.bug}: {said}", end="")
        print(caught or "NOT CAUGHT", flush=True)
    for place in {one.place for one in plantings if one.place}:
        caught_by = [record.found[one.key] for one in plantings if one.place is place]
        tests = [test for test in caught_by if test and "::" in test]
        if tests:  # pytest takes none for all
            place.check(tests)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the bugs to plant; all of them")
    parser.add_argument("--kind", action="append", choices=KINDS, help="all kinds")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "mutants.jsonl")
    arguments = parser.parse_args()
    words = " ".join(arguments.words)
    found = [*in_cpp_and_python(words), *in_cuda(words), *in_triton(words)]
    chosen = [one for one in found if one.kind in (arguments.kind or KINDS)]
    results = run(chosen, Record(arguments.record))
    alive = [one.mutant.bug for one in chosen if Record(arguments.record).found[one.key] is None]
    for kind, caught in results.items():
        if caught:
            print(f"{kind}: {len(caught) - caught.count(None)} of {len(caught)} caught")
    for bug in alive:
        print(f"NOT CAUGHT: {bug}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
