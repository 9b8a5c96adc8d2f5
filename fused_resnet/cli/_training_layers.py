"""``fused-resnet bench --training --layers``: each convolution's three directions."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..bench import environment, results, training_layers
from ..models import sources
from ._common import progress


def run(arguments: argparse.Namespace, title: str, out: Console) -> int:
    """Measure, show and write.

    Args:
        arguments: Parsed command-line arguments of ``fused-resnet bench``.
        title: Title of the tables.
        out: Console that the tables are printed to.
    """
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = sources.plain_model(arguments.model).train()
    found: list[dict[str, Any]] = []
    for batch in arguments.batch:
        images = torch.randn(batch, 3, arguments.size, arguments.size)
        layers = training_layers.layers_of(model, images)
        rows = []
        with progress() as bar:
            task = bar.add_task(f"batch {batch}", total=len(layers))
            for layer, count in layers.items():
                bar.update(task, advance=1, description=f"batch {batch}: {layer}")
                for name, times in training_layers.measure(layer, dtype).items():
                    rows.append(
                        {
                            "layer": str(layer),
                            "count": count,
                            "direction": name,
                            "gflop": layer.flops / 1e9,
                            **times,
                        }
                    )
        peak = training_layers.peak(dtype)
        out.print(_table(rows, peak, f"{title}, batch {batch}"), highlight=False)
        found.append({"batch": batch, "peak_gflops_per_s": peak, "layers": rows})
    if arguments.json:
        about = {
            "model": arguments.model,
            "size": arguments.size,
            "dtype": arguments.dtype,
            "threads": arguments.threads,
            **environment.describe(),
            "command": shlex.join(["fused-resnet", *arguments.typed]),
        }
        results.save(arguments.json, [about | one for one in found])
    return 0


def _table(rows: list[dict[str, Any]], peak: float, title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption=(
            f"The fastest of {training_layers.TURNS} turns each, in ms, and the share of the "
            f"measured peak of {peak:.0f} GFLOP/s by the direct sum's operations, so that "
            "Winograd's algorithm can pass it. PyTorch's times are of the convolution alone; the "
            "fused ones include batch norm, ReLU and their gradients."
        ),
        caption_justify="left",
    )
    table.add_column("layer")
    table.add_column("direction")
    for name in ("calls", "PyTorch", "% peak", "fused", "% peak", "times"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["layer"]):
            table.add_section()
        last = row["layer"]
        table.add_row(
            row["layer"],
            row["direction"],
            str(row["count"]),
            *_time(row["pytorch"], row["gflop"], peak),
            *_time(row["fused"], row["gflop"], peak),
            f"{row['pytorch'] / row['fused']:.2f}",
        )
    total = {name: sum(row["count"] * row[name] for row in rows) for name in ("pytorch", "fused")}
    gflop = sum(row["count"] * row["gflop"] for row in rows)
    table.add_section()
    table.add_row(
        "all convolutions",
        "",
        "",
        *_time(total["pytorch"], gflop, peak),
        *_time(total["fused"], gflop, peak),
        f"{total['pytorch'] / total['fused']:.2f}",
    )
    return table


def _time(ms: float, gflop: float, peak: float) -> tuple[str, str]:
    return f"{ms:.2f}", f"{gflop / ms * 1e3 / peak:.0%}"
