"""A bug to plant in Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In ``file`` of the Triton backend, ``old``, which occurs once, is replaced by ``new``.

    Quick ones are planted in every `make test`.
    """

    bug: str
    file: str
    old: str
    new: str
    tests: str
    quick: bool = False
