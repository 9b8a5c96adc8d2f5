"""``fused-resnet bench``: images per second, each provider in a process of its own."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..bench import environment, harness, plot, problem, results, training
from ..bench.providers import NAMES, OURS, PEERS
from ..models import sources
from ..tuning import processor
from . import _training, _training_layers
from ._choices import network_calls, table_of
from ._common import (
    DTYPES,
    UsageError,
    console,
    listed,
    network,
    one_of,
    positive,
    progress,
    writable,
)
from ._layers import table_of as table_of_layers
from ._layers import view

DEFAULT_PROVIDERS = ("eager", "channels_last", "compile", "jit", "fused", "frozen")


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="time a network's inference or training against PyTorch's ways to run it",
        description="Each provider runs in a process of its own, its answer is checked against "
        "float64 before it is timed, and rounds alternate. Ratios are of medians in the same run, "
        f"against {results.BASELINE}. Exit code 1 if a provider fails or answers wrongly.",
    )
    parser.add_argument("model", nargs="?", type=network, help="for example resnet50")
    parser.add_argument(
        "--model-from",
        type=network,
        metavar="SOURCE:NAME",
        help="the network of another library, with random weights and without a download: "
        "torchvision:resnet50, timm:resnet50 or hf:microsoft/resnet-50",
    )
    parser.add_argument(
        "--dtype", type=one_of("dtype", DTYPES), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--providers",
        type=providers_of,
        default=list(DEFAULT_PROVIDERS),
        metavar="P,...",
        help=f"all, or of {', '.join(NAMES)} (default: {','.join(DEFAULT_PROVIDERS)}); "
        "one whose package is missing is named and left out",
    )
    add_measurement(parser)
    parser.add_argument(
        "--training",
        action="store_true",
        help="time training steps: forward, backward and SGD, with the share of each and the peak "
        "memory; half precision by autocast. With --layers: every convolution's three directions "
        "beside PyTorch's, with its share of the measured peak. Providers: "
        f"{', '.join(training.NAMES)} (default: {','.join(training.DEFAULT)})",
    )
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


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """Options of every command that measures whole networks with :func:`measure`."""
    parser.add_argument(
        "--batch",
        type=listed(positive),
        default=[1, 16],
        metavar="N,...",
        help="batch sizes (default: 1,16)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=environment.cores(),
        help="of each process (default: the cores of this machine)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        help="height and width of the images (default: 224, of CIFAR's networks 32)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="turns of each provider (default: 10)"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the rows")


def providers_of(text: str) -> list[str]:
    """An argparse type: ``all``, or a list of providers."""
    if text == "all":
        return list(NAMES)
    return listed(one_of("provider", _training.provider_names(NAMES)))(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and show."""
    if (arguments.model is None) == (arguments.model_from is None):
        raise UsageError("bench: expected a model, or --model-from SOURCE:NAME, and not both")
    arguments.model = arguments.model or arguments.model_from
    arguments.size = arguments.size or sources.size_of(arguments.model)
    if arguments.explain and arguments.model not in sources.MODELS:
        raise UsageError(f"bench: --explain: expected one of {', '.join(sources.MODELS)}")
    if arguments.size < 32:
        raise UsageError(f"bench: --size: expected at least 32, got {arguments.size}")
    if arguments.training:
        return run_training(arguments)
    if arguments.layers:
        return view_layers(arguments)
    command = shlex.join(["fused-resnet", *arguments.typed])
    rows: list[results.Row] = []
    for batch in arguments.batch:
        model, images = problem.random_problem(arguments.model, batch, arguments.size)
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
        f"{arguments.threads} threads, {processor.name()}"
    )
    out = console()
    out.print(results.table(rows, title))
    if arguments.explain:
        for batch in arguments.batch:
            out.print(explain(arguments, batch))
    if arguments.json:
        results.save(arguments.json, rows)
    if arguments.plot:
        _plot(arguments.plot, rows)
    return complain(rows)


def run_training(arguments: argparse.Namespace) -> int:
    """Measure and show training steps, or a network's convolutions in their three directions."""
    if arguments.explain:
        raise UsageError("bench: --training: does not go with --explain")
    out = console()
    size = f"{arguments.size}x{arguments.size}"
    title = f"training {arguments.model}, {size}, {arguments.dtype}, {arguments.threads} threads, "
    title += processor.name()
    if arguments.layers:
        return _training_layers.run(arguments, title, out)
    providers = _training.providers_of(arguments.providers, DEFAULT_PROVIDERS)
    rows = _training.measure(arguments, providers)
    out.print(_training.table_of(rows, title))
    if arguments.json:
        results.save(arguments.json, rows)
    if arguments.plot:
        _plot(arguments.plot, rows)
    return complain(rows)


def _plot(path: Path, rows: list[results.Row]) -> None:
    try:
        plot.save(path, rows)
    except ValueError as error:
        raise UsageError(f"bench: --plot: {error}") from None


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
            plain, images = problem.random_problem(arguments.model, batch, arguments.size)
            model = sources.our_model(arguments.model, plain.state_dict())
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
    title = f"{arguments.model}, {size}, {arguments.dtype}, {processor.name()}"
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
    more: Callable[[Path], list[harness.Entry]] = lambda folder: [],
) -> list[results.Row]:
    """Rows of one network at one batch, with a progress bar.

    Args:
        model: The network in eval, float32.
        images: The batch, float32.
        name: From :func:`fused_resnet.bench.sources.parse`.
        providers: Of :data:`fused_resnet.bench.providers.NAMES`.
        dtype: Storage type that the providers run in.
        threads: Of each process.
        rounds: Turns of each provider.
        command: What was typed, for the rows.
        more: Of the problem's folder, entries to measure beside the providers.
    """
    batch, size = images.shape[0], images.shape[-1]
    with tempfile.TemporaryDirectory(prefix="fused-resnet-") as folder, progress() as bar:
        task = bar.add_task(f"{name}, batch {batch}: float64 answer", total=None)
        problem.write_problem(Path(folder), model, images)
        entries = problem.entries(providers, name, dtype, Path(folder)) + more(Path(folder))
        bar.update(task, total=harness.steps(entries, rounds))
        measurements = harness.compare(
            entries,
            threads=threads,
            rounds=rounds,
            jobs=environment.cores(),
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
        peers=PEERS,
        environment={**environment.describe(), "command": command},
    )
