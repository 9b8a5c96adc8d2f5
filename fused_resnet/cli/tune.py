"""``fused-resnet tune``: time the backends for a network's calls ahead of its use."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..models import sources
from ..tuning import cache as tuning_cache
from ..tuning import processor, tuner
from ._choices import network_calls, table_of, training_calls
from ._common import UsageError, console, listed, network_or_file, one_of, positive

#: Storage types for which the tuner chooses.
DTYPES = ("float32", "bfloat16", "float16")


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "tune",
        description="Runs a fused network's inference once, times each backend for each of its "
        "different calls, and stores the times in the user's cache folder (FUSED_RESNET_CACHE) "
        "for later processes. Without this, a process times a call when it first occurs "
        "(FUSED_RESNET_TUNE).",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=network_or_file,
        help="a network (fused-resnet models), or a frozen file",
    )
    parser.add_argument(
        "--batch", type=listed(positive), default=[1], metavar="N,...", help="default: 1"
    )
    parser.add_argument(
        "--dtype", type=one_of("dtype", DTYPES), default="float32", help="default: float32"
    )
    parser.add_argument("--device", type=one_of("device", ("cpu", "cuda")), help="default: cpu")
    parser.add_argument(
        "--threads", type=positive, default=processor.threads(), help="number of threads on a CPU"
    )
    parser.add_argument(
        "--size",
        type=positive,
        help="height and width of the images (default: 224; 32 for CIFAR's networks)",
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="the convolutions of a training step, forward and backward, in place of inference; "
        "16-bit types by autocast. On a CPU a training step times nothing by itself",
    )
    parser.add_argument(
        "--exhaustive", action="store_true", help="more rounds, like FUSED_RESNET_TUNE=exhaustive"
    )
    parser.add_argument(
        "--clear",
        action="store_true",
        help="remove the stored times first: those of the network's calls, which are then timed "
        "again, or without a network all of this machine and these versions",
    )
    parser.set_defaults(run=run)


@contextlib.contextmanager
def _timing(how: str) -> Iterator[None]:
    """``FUSED_RESNET_TUNE`` for a while."""
    before = os.environ.get("FUSED_RESNET_TUNE")
    os.environ["FUSED_RESNET_TUNE"] = how
    try:
        yield
    finally:
        if before is None:
            del os.environ["FUSED_RESNET_TUNE"]
        else:
            os.environ["FUSED_RESNET_TUNE"] = before


def run(arguments: argparse.Namespace) -> int:
    """Time and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    file = arguments.model
    if file is None and not arguments.clear:
        raise UsageError("tune: expected a network, a frozen file, or --clear")
    device = arguments.device or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("tune: --device: PyTorch sees no CUDA device")
    torch.set_num_threads(arguments.threads)
    if file is None:
        removed = tuning_cache.remove(tuner.machine_of(torch.device(device)))
        tuner.forget()
        print(f"removed {removed} calls")
        return 0
    size = arguments.size or sources.size_of(file.network)
    if size < 32:
        raise UsageError(f"tune: --size: expected at least 32, got {size}")
    try:
        stored = tuning_cache.path()
    except OSError as error:
        raise UsageError(f"tune: the times would be lost: {error}") from None
    dtype = getattr(torch, arguments.dtype)
    missing = 0
    with _timing("exhaustive" if arguments.exhaustive else "1"):
        for batch in arguments.batch:
            model = sources.our_model(file.network, file.state or None)
            calls = (training_calls if arguments.training else network_calls)(
                model, batch, size, dtype, device
            )
            if arguments.clear:
                keys = [call.key for call, _ in calls]
                tuning_cache.remove(tuner.machine_of(torch.device(device)), keys)
                tuner.forget()
            title = f"{file.network}, batch {batch}, {arguments.dtype}, {device}"
            title += ", training" if arguments.training else ""
            console().print(table_of(calls, title))
            known = tuning_cache.load(tuner.machine_of(torch.device(device)))
            missing += sum(call.key not in known for call, _ in calls)
    print(f"stored in {stored}")
    if missing:
        print(
            f"fused-resnet: warning: {missing} calls are not stored: other work on the machine "
            "took part of their time; run this again when it is idle",
            file=sys.stderr,
        )
    return 0
