"""Bugs to plant in CUDA's sources, each of which a build of the simulator must catch.

``python tests/simt/mutants.py [words of a bug]`` plants them and prints the table.
"""

from __future__ import annotations

import sys

import mutants_bn
import mutants_conv
import mutants_stem
from planting import catch, table
from rich.console import Console

MUTANTS = [*mutants_conv.MUTANTS, *mutants_bn.MUTANTS, *mutants_stem.MUTANTS]
#: Planted in every `make test`; the others in `make test-all`.
QUICK = MUTANTS[::30]


def main() -> int:
    wanted = " ".join(sys.argv[1:])
    results = []
    for mutant in MUTANTS:
        if wanted in mutant.bug:
            results.append((mutant, catch(mutant)))
            print(mutant.bug, "->", results[-1][1], flush=True)
    Console(width=200).print(table(results))
    alive = sum(caught is None for _, caught in results)
    print(f"{len(results) - alive} of {len(results)} caught")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
