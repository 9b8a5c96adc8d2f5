"""``torch.compile`` with ``max-autotune``, without a limit of its own: for a second window."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from . import networks, plain, training
from .cases import Case, Row, Target


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """Inference at a large batch, the training step, and inference at batch 1.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    batch = plain.batch_of(target)
    wanted: list[tuple[str, int, str, Callable[[Row], Iterator[Row]]]] = []
    for images in (batch, 1):
        run = functools.partial(networks.run_provider, target, "compile", images, precision)
        wanted.append(("inference", images, "max-autotune", run))
    # The optimiser writes to what CUDA graphs would hold: they are left out of a training step.
    step = functools.partial(training.run_provider, target, "compile", precision)
    wanted.insert(1, ("training step", batch, "max-autotune-no-cudagraphs", step))
    found = []
    for what, images, mode, one in wanted[: 1 if target.tiny else None]:
        about: Row = {"kind": "time", "what": f"{what} of {plain.name_of(target)}"}
        about |= {"provider": f"compile, {mode}", "batch": images, "precision": precision}
        about |= {"unit": "ms", "mode": mode}
        name = f"{what}, batch {images}, {mode}"
        found.append(Case(name, functools.partial(one, about), about))
    return found
