"""A bug to plant, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = " ".join(
    f"tests/ops/test_{name}.py"
    for name in ("operations", "packed", "inputs", "wrong_arguments", "winograd")
)
BFLOAT16 = "tests/ops/test_bfloat16.py"
BACKWARD = "tests/ops/test_autograd.py"
BLOCKS = "tests/test_whole_blocks.py"
PROGRAM = "tests/test_program.py"
HEAD = "tests/test_program_head.py"
CALLS = "tests/test_program_calls.py"
POOLS = "tests/test_program_pools.py"
SWAP = "tests/fusion/test_traced_groups.py tests/fusion/test_traced_guards.py"
ALIASING = "tests/fusion/test_traced_aliasing.py"


@dataclass(frozen=True)
class Mutant:
    """A bug to plant.

    Attributes:
        bug: What is wrong.
        file: Path of the source.
        old: The text to replace, which must occur exactly once.
        new: The text that replaces it.
        tests: Paths of the tests that must fail, separated by spaces.
        isa: The instruction set that the tests run on.
    """

    bug: str
    file: str
    old: str
    new: str
    tests: str = FORWARD
    isa: str = "portable"
