"""``fused-resnet bench``: images per second of each provider, in separate processes."""

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

from ..bench import environment, harness, inference, plot, problem, results, training
from ..bench.providers import NAMES, OURS, PEERS
from ..models import sources
from ..tuning import processor
from . import _programs, _training, _training_layers
from ._choices import network_calls, table_of
from ._common import (
    DTYPES,
    UsageError,
    console,
    listed,
    network_or_file,
    one_of,
    positive,
    progress,
    threads_of,
    writable,
)
from ._layers import table_of as table_of_layers
from ._layers import view

DEFAULT_PROVIDERS = ("eager", "channels_last", "compile", "jit", "fused", "frozen")


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "bench",
        description="Each provider runs in a separate process, its result is compared with float64 "
        "before it is timed, and rounds alternate. Ratios are those of medians in the same run, to "
        f"{results.BASELINE}. Exit code 1 if a provider fails or its result is wrong.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=network_or_file,
        help="a network (fused-resnet models) with random weights, or a frozen file",
    )
    parser.add_argument(
        "--model-from",
        type=network_or_file,
        metavar="SOURCE:NAME",
        help="the same as the model",
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
        "those whose packages are missing are reported and skipped",
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
        "--trainable",
        type=lambda text: text.split(","),
        default=[],
        metavar="PART,...",
        help="with --training: fine-tune these children of the network, for example layer4,fc; the "
        "rest and all batch norms are frozen",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show which backend runs each call of the fused network, and the time of each; and "
        "each step of the frozen network's programs: algorithm, shape and micro-batch",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="instead of a comparison, show each operation of the frozen network (or of the "
        "providers frozen, frozen_direct and fused in --providers), timed inside whole forwards, "
        "with its share of this machine's measured peak and memory bandwidth",
    )
    parser.add_argument("--plot", type=writable, metavar="FILE.png", help="write a bar chart")
    parser.set_defaults(run=run)


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that call :func:`measure`.

    Args:
        parser: The command's parser.
    """
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
        default=processor.threads(),
        help="threads of each process (default: processors that it may use; OMP_NUM_THREADS)",
    )
    parser.add_argument(
        "--size",
        type=positive,
        help="height and width of the images (default: 224; 32 for CIFAR's networks)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=10, help="turns of each provider (default: 10)"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the rows")


def providers_of(text: str) -> list[str]:
    """An argparse type: ``all``, or a list of providers.

    Args:
        text: Text of the argument: ``all``, or names with commas between them.
    """
    if text == "all":
        return list(NAMES)
    return listed(one_of("provider", _training.provider_names(NAMES)))(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    if (arguments.model is None) == (arguments.model_from is None):
        raise UsageError("bench: expected a model or --model-from SOURCE:NAME, and not both")
    file = arguments.model or arguments.model_from
    arguments.model, arguments.state = file.network, file.state or None
    arguments.size = arguments.size or sources.size_of(arguments.model)
    if arguments.size < 32:
        raise UsageError(f"bench: --size: expected at least 32, got {arguments.size}")
    if arguments.training:
        return run_training(arguments)
    if arguments.trainable:
        raise UsageError("bench: --trainable: needs --training")
    if arguments.layers:
        return view_layers(arguments)
    command = shlex.join(["fused-resnet", *arguments.typed])
    rows: list[results.Row] = []
    for batch in arguments.batch:
        model, images = problem.random_problem(
            arguments.model, batch, arguments.size, arguments.state
        )
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
        f"{threads_of(arguments.threads)}, {processor.name()}"
    )
    out = console()
    out.print(results.table(rows, title))
    if arguments.explain:
        for batch in arguments.batch:
            out.print(explain(arguments, batch))
            network = sources.our_model(arguments.model, arguments.state)
            where = (batch, arguments.size, getattr(torch, arguments.dtype), arguments.threads)
            out.print(_programs.table_of(network, *where), highlight=False)
    if arguments.json:
        results.save(arguments.json, rows)
    if arguments.plot:
        _plot(arguments.plot, rows)
    return complain(rows)


def run_training(arguments: argparse.Namespace) -> int:
    """Measure and show training steps, or a network's convolutions in their three directions.

    Args:
        arguments: Parsed command-line arguments of ``fused-resnet bench``.

    Returns:
        The exit status of the process.
    """
    if arguments.state:
        raise UsageError("bench: --training: expected a network's name, not a frozen file")
    if arguments.explain:
        raise UsageError("bench: --training: does not go with --explain")
    if arguments.layers and arguments.trainable:
        raise UsageError("bench: --layers: does not go with --trainable")
    out = console()
    title = f"training {_training.subject_of(arguments)}, {arguments.size}x{arguments.size}, "
    title += f"{arguments.dtype}, {threads_of(arguments.threads)}, {processor.name()}"
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
    """Print each operation of a forward, for each batch and provider.

    Args:
        arguments: Parsed command-line arguments of ``fused-resnet bench``.

    Returns:
        The exit status of the process.
    """
    viewed = [name for name in arguments.providers if name in OURS]
    if arguments.providers == list(DEFAULT_PROVIDERS):
        viewed = ["frozen"]
    if not viewed:
        raise UsageError(f"bench: --layers: expected --providers of {', '.join(OURS)}")
    if arguments.plot or arguments.explain:
        raise UsageError("bench: --layers: cannot be combined with --plot or --explain")
    found = []
    for batch in arguments.batch:
        for provider in viewed:
            plain, images = problem.random_problem(
                arguments.model, batch, arguments.size, arguments.state
            )
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
    """A table of the backend that the tuner chooses for each call of the fused network.

    Args:
        arguments: The command's arguments.
        batch: Number of images.
    """
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = sources.our_model(arguments.model, arguments.state)
    calls = network_calls(model, batch, arguments.size, dtype)
    return table_of(calls, f"the fused network's calls, batch {batch}")


def complain(rows: list[results.Row]) -> int:
    """Print what was not timed, or may not be trusted, to stderr; return 1 if one failed, else 0.

    Args:
        rows: Result rows.
    """
    for line in results.complaints(rows):
        print(f"fused-resnet: {line}", file=sys.stderr)
    for line in results.doubts(rows):
        print(f"fused-resnet: warning: {line}", file=sys.stderr)
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
        model: The network in eval mode, float32.
        images: The batch, float32.
        name: A network's name from :func:`fused_resnet.models.sources.parse`.
        providers: Names of :data:`fused_resnet.bench.providers.NAMES`.
        dtype: Storage type of the providers.
        threads: Number of threads of each process.
        rounds: Number of turns of each provider.
        command: The command line, for the rows.
        more: Returns further entries to measure, given the problem's folder.
    """
    batch, size = images.shape[0], images.shape[-1]
    with tempfile.TemporaryDirectory(prefix="fused-resnet-") as folder, progress() as bar:
        task = bar.add_task(f"{name}, batch {batch}: float64 result", total=None)
        problem.write_problem(Path(folder), model, images)
        entries = inference.entries(providers, name, dtype, Path(folder)) + more(Path(folder))
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
