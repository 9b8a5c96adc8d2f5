"""``fused-resnet bench``: images per second, each provider in a process of its own."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..bench import environment, harness, networks, plot, results
from ..bench.providers import OURS, PROVIDERS
from ._choices import network_calls, table_of
from ._common import DTYPES, UsageError, console, listed, one_of, positive, progress, writable
from ._layers import table_of as table_of_layers
from ._layers import view

DEFAULT_PROVIDERS = ("eager", "channels_last", "compile", "jit", "fused", "frozen")


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="time a network's inference against PyTorch's ways to run it",
        description="Each provider runs in a process of its own, its answer is checked against "
        "float64 before it is timed, and rounds alternate. Ratios are of medians in the same run, "
        f"against {results.BASELINE}. Exit code 1 if a provider fails or answers wrongly.",
    )
    parser.add_argument("model", type=one_of("model", networks.MODELS), help="for example resnet50")
    parser.add_argument(
        "--batch",
        type=listed(positive),
        default=[1, 16],
        metavar="N,...",
        help="batch sizes (default: 1,16)",
    )
    parser.add_argument(
        "--dtype", type=one_of("dtype", DTYPES), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=environment.cores(),
        help="of each process (default: the cores of this machine)",
    )
    parser.add_argument(
        "--providers",
        type=listed(one_of("provider", PROVIDERS)),
        default=list(DEFAULT_PROVIDERS),
        metavar="P,...",
        help=f"default: {','.join(DEFAULT_PROVIDERS)}",
    )
    parser.add_argument(
        "--size", type=positive, default=224, help="height and width of the images (default: 224)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="turns of each provider (default: 10)"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the rows")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show which backend runs each call of the fused network, and by how much it is faster",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="instead of a comparison: each operation of the frozen network (or of those of "
        "frozen, frozen_direct and fused that --providers names), timed inside whole forwards, "
        "with its share of this machine's measured peak and memory bandwidth",
    )
    parser.add_argument("--plot", type=writable, metavar="FILE.png", help="draw the rows")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and show."""
    if arguments.size < 32:
        raise UsageError(f"bench: --size: expected at least 32, got {arguments.size}")
    if arguments.layers:
        return view_layers(arguments)
    command = shlex.join(["fused-resnet", *arguments.typed])
    rows: list[results.Row] = []
    for batch in arguments.batch:
        model, images = problem(arguments, batch)
        rows += measure(
            model,
            images,
            name=arguments.model,
            providers=arguments.providers,
            dtype=arguments.dtype,
            threads=arguments.threads,
            rounds=arguments.rounds,
            command=command,
        )
    title = (
        f"{arguments.model}, {arguments.size}x{arguments.size}, {arguments.dtype}, "
        f"{arguments.threads} threads, {environment.device()}"
    )
    out = console()
    out.print(results.table(rows, title))
    if arguments.explain:
        for batch in arguments.batch:
            out.print(explain(arguments, batch))
    if arguments.json:
        results.save(arguments.json, rows)
    if arguments.plot:
        try:
            plot.save(arguments.plot, rows)
        except ValueError as error:
            raise UsageError(f"bench: --plot: {error}") from None
    return complain(rows)


def problem(arguments: argparse.Namespace, batch: int) -> tuple[nn.Module, Tensor]:
    """The network and one batch of images, float32."""
    generator = torch.Generator().manual_seed(batch)
    shape = (3, arguments.size, arguments.size)
    images = torch.randn(batch, *shape, generator=generator)
    # Not on the images themselves: the statistics of a batch of one make no network.
    others = torch.randn(8, *shape, generator=generator)
    return networks.random_model(arguments.model, others), images


def view_layers(arguments: argparse.Namespace) -> int:
    """Each operation of a forward, for each batch and provider."""
    viewed = [name for name in arguments.providers if name in OURS]
    if arguments.providers == list(DEFAULT_PROVIDERS):
        viewed = ["frozen"]
    if not viewed:
        raise UsageError(f"bench: --layers: expected --providers of {', '.join(OURS)}")
    if arguments.plot or arguments.explain:
        raise UsageError("bench: --layers: goes with neither --plot nor --explain")
    found = []
    for batch in arguments.batch:
        for provider in viewed:
            model, images = problem(arguments, batch)
            found.append(
                view(
                    model,
                    images.to(getattr(torch, arguments.dtype)),
                    provider=provider,
                    threads=arguments.threads,
                    forwards=arguments.rounds,
                )
            )
    out = console()
    if not out.is_terminal:
        out.width = 200
    size = f"{arguments.size}x{arguments.size}"
    title = f"{arguments.model}, {size}, {arguments.dtype}, {environment.device()}"
    for one in found:
        out.print(table_of_layers(one, title), highlight=False)
    if arguments.json:
        about = {
            "model": arguments.model,
            "size": arguments.size,
            "dtype": arguments.dtype,
            **environment.describe(),
            "command": shlex.join(["fused-resnet", *arguments.typed]),
        }
        results.save(arguments.json, [about | one for one in found])
    return 0


def explain(arguments: argparse.Namespace, batch: int) -> Table:
    """What the tuner chooses for each call of the fused network."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    calls = network_calls(arguments.model, batch, arguments.size, dtype)
    return table_of(calls, f"the fused network's calls, batch {batch}")


def complain(rows: list[results.Row]) -> int:
    """Say on stderr what was not timed. 1 if that is anybody's fault, 0 otherwise."""
    for line in results.complaints(rows):
        print(f"fused-resnet: {line}", file=sys.stderr)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def measure(
    model: nn.Module,
    images: Tensor,
    *,
    name: str,
    providers: list[str],
    dtype: str,
    threads: int,
    rounds: int,
    command: str,
) -> list[results.Row]:
    """Rows of one network at one batch, with a progress bar.

    Args:
        model: torchvision's network in eval, float32.
        images: The batch, float32.
        name: The network's name in torchvision.
        providers: Names of :data:`fused_resnet.bench.providers.PROVIDERS`.
        dtype: Storage type that the providers run in.
        threads: Of each process.
        rounds: Turns of each provider.
        command: What was typed, for the rows.
    """
    batch, size = images.shape[0], images.shape[-1]
    with tempfile.TemporaryDirectory(prefix="fused-resnet-") as folder, progress() as bar:
        task = bar.add_task(f"{name}, batch {batch}: float64 answer", total=None)
        networks.write_problem(Path(folder), model, images)
        entries = networks.entries(providers, name, dtype, Path(folder))
        bar.update(task, total=harness.steps(entries, rounds))
        measurements = harness.compare(
            entries,
            threads=threads,
            rounds=rounds,
            progress=lambda provider, action: bar.update(
                task, advance=1, description=f"{name}, batch {batch}: {provider}, {action}"
            ),
        )
    return results.rows(
        measurements,
        subject=name,
        batch=batch,
        dtype=dtype,
        size=size,
        threads=threads,
        environment={**environment.describe(), "command": command},
    )
