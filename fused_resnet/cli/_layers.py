"""``fused-resnet bench --layers``: the time of each operation of a network's forward."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..bench import layers
from ..bench.providers import OURS
from ._common import progress, threads_of


def view(
    model: nn.Module, images: Tensor, *, provider: str, threads: int, forwards: int
) -> dict[str, Any]:
    """Profile one network in this process.

    Args:
        model: The network in eval mode, float32; its dtype and memory format may change.
        images: One batch in the storage dtype.
        provider: A key of :data:`fused_resnet.bench.providers.OURS`.
        threads: Number of threads of this process.
        forwards: Number of forwards.

    Returns:
        A dictionary for JSON: ``forward_ms``, the machine's ``peak_gflops_per_s`` and memory
        ``read_gb_per_s`` and ``copy_gb_per_s``, and ``layers``.
    """
    torch.set_num_threads(threads)
    network, images = OURS[provider](model, images)
    with progress() as bar:
        task = bar.add_task(f"batch {images.shape[0]}, {provider}", total=forwards)
        found = layers.profile(
            network, images, forwards=forwards, progress=lambda: bar.advance(task)
        )
    top = layers.machine(images.dtype)
    return {
        "provider": provider,
        "batch": images.shape[0],
        "threads": threads,
        "forward_ms": found.forward * 1e3,
        "peak_gflops_per_s": top.flops / 1e9,
        "read_gb_per_s": top.read / 1e9,
        "copy_gb_per_s": top.copy / 1e9,
        "layers": layers.rows(found, top),
    }


def table_of(found: dict[str, Any], title: str) -> Table:
    """A table of this package's operations, their total, and the rest.

    Args:
        found: A result of :func:`view`.
        title: Title of the table.
    """
    threads = threads_of(found["threads"])
    table = Table(
        title=f"{title}, batch {found['batch']}, {threads}, {found['provider']}",
        title_justify="left",
        caption=(
            f"A forward takes {found['forward_ms']:.2f} ms. Peak {found['peak_gflops_per_s']:.0f} "
            f"GFLOP/s and memory {found['read_gb_per_s']:.1f} GB/s are measured on these threads. "
            "Times are medians of each operation inside whole forwards, where the convolutions "
            "of a block run separately. GFLOP counts the direct algorithm, so Winograd's can "
            "exceed the peak, and bytes are the minimal traffic, so maps in the cache can exceed "
            "the memory's bandwidth."
        ),
        caption_justify="left",
    )
    for name in ("layer", "operation", "algorithm"):
        table.add_column(name)
    for name in ("calls", "ms", "% time", "GFLOP", "GFLOP/s", "% peak", "MB", "GB/s", "% memory"):
        table.add_column(name, justify="right")
    *layers, total, outside = found["layers"]
    for row in layers:
        if row["fused"]:
            table.add_row(*_cells(row, row["what"] or row["operator"]))
    table.add_section()
    table.add_row(*_cells(total, "this package's operations"))
    for row in layers:
        if not row["fused"] and row["share_of_forward"] >= 0.001:
            table.add_row(*_cells(row, row["what"] or row["operator"]))
    table.add_row(*_cells(outside, "Python, dispatch, small operators"))
    return table


def _cells(row: dict[str, Any], what: str) -> list[str]:
    numbers = [str(row["calls"] or ""), f"{row['ms']:.3f}", f"{row['share_of_forward']:.1%}"]
    if row["gflop"]:
        numbers += [f"{row['gflop']:.3f}", f"{row['gflops_per_s']:.0f}"]
        numbers += [f"{row['share_of_peak']:.0%}"]
    else:
        numbers += ["", "", ""]
    if row["mb"]:
        numbers += [f"{row['mb']:.1f}", f"{row['gb_per_s']:.1f}"]
        numbers += [f"{row['share_of_bandwidth']:.0%}"]
    return [row["path"], what, row["algorithm"], *numbers]
