"""Random numbers that depend on what they are for, and not on who draws them or when.

The order of an epoch and the augmentation of an image have seeds of their own, made from the run's
seed, the epoch and the image. So a resumed run, and one with another number of worker processes,
draws the same numbers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mixed(*parts: int) -> int:
    """A seed of 64 bits from several numbers.

    Args:
        parts: Whole numbers that say what the seed is for.

    Source:
        The finaliser of splitmix64: Steele et al., "Fast splittable pseudorandom number
        generators", OOPSLA 2014.
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Within the ``with`` block PyTorch's generator of the CPU starts from a seed of its own.

    Args:
        seed: Seed of 64 bits.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def start(seed: int) -> None:
    """Seed every generator of this process.

    Args:
        seed: Seed of the run.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def state() -> dict[str, Any]:
    """The state of every generator of this process, in types that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def restore(found: dict[str, Any]) -> None:
    """Restore what :func:`state` returned.

    Args:
        found: State of the generators, from a checkpoint.
    """
    torch.set_rng_state(found["torch"])
    if found["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])
    random.setstate(found["python"])
    name, keys, *rest = found["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
