"""Bugs to plant in CUDA's sources, each of which a build of the simulator must catch."""

from __future__ import annotations

import mutants_bn
import mutants_conv
import mutants_conv_epilogue
import mutants_stem
import mutants_stem_patch
import mutants_training

MUTANTS = [
    *mutants_conv.MUTANTS,
    *mutants_conv_epilogue.MUTANTS,
    *mutants_bn.MUTANTS,
    *mutants_stem.MUTANTS,
    *mutants_stem_patch.MUTANTS,
    *mutants_training.MUTANTS,
]

#: Planted in every `make test`: a bug in each operation and for each build of the simulator, in
#: files that few others include. `make mutants` plants all.
QUICK = [
    m
    for m in MUTANTS
    if m.bug
    in (
        "statistics: merged slabs keep the rows of one",
        "on chip: no ReLU in the middle",
        "bn: no barrier between writing and reading parts",
        "stem: channels past the last are written",
        "data gradient: filters of another group",
    )
]
