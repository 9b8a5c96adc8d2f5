"""``fused-resnet serve-check``: a frozen file's error and speed against the eager network."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from ..bench import results, serving
from ..bench.networks import LIMITS
from ..inference.archive import load_frozen, read_frozen
from ..inference.explain import explain, summary
from ..models import sources
from ..tuning import processor
from ._common import UsageError, console, threads_of
from .bench import add_measurement, complain, measure


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "serve-check",
        description="Loads the file as a server would, and the eager network with the same "
        "weights, each in a separate process. Every result is compared with the eager network in "
        f"float64 and must be within {LIMITS['float32']:g} (bfloat16: "
        f"{LIMITS['bfloat16']:g}, float16: {LIMITS['float16']:g}, float64: {LIMITS['float64']:g}), "
        "relative, or it is not timed; then rounds alternate. Exit code 1 if a result is wrong.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a file that fused-resnet freeze wrote"
    )
    add_measurement(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, measure and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    try:
        file = read_frozen(arguments.file)
    except ValueError as error:
        raise UsageError(f"serve-check: {error}") from None
    try:
        eager = sources.plain_model(sources.parse(file.network), file.state)
    except ValueError as error:
        raise UsageError(f"serve-check: {arguments.file}: {str(error).splitlines()[0]}") from None
    size = arguments.size or sources.size_of(file.network)
    if size < 32:
        raise UsageError(f"serve-check: --size: expected at least 32, got {size}")
    dtype = str(file.dtype).removeprefix("torch.")
    rows: list[results.Row] = []
    for batch in arguments.batch:
        generator = torch.Generator().manual_seed(batch)
        rows += measure(
            eager,
            torch.randn(batch, 3, size, size, generator=generator),
            name=file.network,
            providers=["eager", "channels_last"],
            dtype=dtype,
            threads=arguments.threads,
            rounds=arguments.rounds,
            command=shlex.join(["fused-resnet", *arguments.typed]),
            more=lambda folder: [serving.entry(arguments.file, dtype, folder)],
        )
    title = (
        f"{escape(str(arguments.file))}: {file.network}, {file.classes} classes, {size}x{size}, "
        f"{dtype}, {threads_of(arguments.threads)}, {processor.name()}"
    )
    console().print(results.table(rows, title))
    for row in rows:
        if row["provider"] == serving.NAME and row["error"] is not None:
            print(
                f"batch {row['batch']}: relative error against eager float64 {row['error']:.1e}, "
                f"{'within' if row['status'] == 'ok' else 'beyond'} the limit of {LIMITS[dtype]:g}"
            )
    torch.set_num_threads(arguments.threads)
    network = load_frozen(arguments.file)
    for batch in arguments.batch:
        programs = explain(network, torch.zeros(batch, 3, size, size, dtype=file.dtype))
        print(f"batch {batch}: {summary(programs)}")
    if arguments.json:
        results.save(arguments.json, rows)
    return complain(rows)
