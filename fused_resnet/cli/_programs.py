"""A table of the programs that a frozen network runs, step by step."""

from __future__ import annotations

import torch
from rich.table import Table
from torch import nn

from ..bench.providers import OURS
from ..inference.explain import describe, explain, summary
from ._common import threads_of


def table_of(network: nn.Module, batch: int, size: int, dtype: torch.dtype, threads: int) -> Table:
    """What the frozen network runs for one batch.

    Args:
        network: Network in eval mode; its dtype and memory format may change.
        batch: Number of images.
        size: Height and width of the images.
        dtype: Storage type.
        threads: Number of threads of this process.
    """
    torch.set_num_threads(threads)
    programs = explain(*OURS["frozen"](network, torch.zeros(batch, 3, size, size, dtype=dtype)))
    table = Table(
        title=f"the frozen network's programs, batch {batch}, {threads_of(threads)}",
        title_justify="left",
        caption=(
            f"{summary(programs)}. A micro-batch goes through several steps before the next one "
            "begins."
        ),
        caption_justify="left",
    )
    for name in ("module", "step", "algorithm"):
        table.add_column(name)
    for name in ("result", "micro-batch"):
        table.add_column(name, justify="right")
    for program in programs:
        for step in program.steps:
            table.add_row(
                step.path,
                describe(step),
                step.algorithm,
                "x".join(map(str, step.result)),
                str(step.images),
            )
        table.add_section()
    return table
