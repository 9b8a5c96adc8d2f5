"""``fused-resnet story``: plain networks get worse with depth, residual ones don't."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import training
from ..bench import environment
from ..models.optional import MissingPackageError
from ..training import story
from ..training.report import reporter
from ..tuning import processor
from . import _settings
from ._common import UsageError, console, listed

#: The settings that are options, in the order of ``--help``.
OPTIONS = (
    "data_root", "download", "epochs", "batch", "lr", "drops", "warmup", "weight_decay", "augment",
    "dtype", "channels_last", "unfused", "compile", "device", "deterministic", "workers", "seed",
)  # fmt: skip

#: The paper's.
EPOCHS = 164


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "story",
        help="the ResNet paper's experiment: depth hurts plain networks, not residual ones",
        description="Trains plain and residual networks of 20 and 56 layers on the same images "
        "with the paper's schedule, scaled to --epochs, and draws the paper's figure 6: error "
        "against iterations, training error dashed and test error solid, plain networks left, "
        "residual right. Writes OUT/story.png and OUT/story.json, and a run for each network. The "
        "same command again goes on where the last one stopped.",
    )
    parser.add_argument(
        "--data",
        default="cifar10",
        metavar="D",
        help="as for fused-resnet train (default: cifar10)",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="folder, which is made")
    parser.add_argument(
        "--networks",
        type=listed(_network),
        default=list(story.NETWORKS),
        metavar="NAME,...",
        help="plain- or residual- and 20, 32, 44, 56 or 110 (default: "
        + ",".join(f"{kind}-{depth}" for kind, depth in story.NETWORKS)
        + ")",
    )
    _settings.add(parser, OPTIONS, {"epochs": EPOCHS, "warmup": f"{story.PAPER['warmup']:g}"})
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train what is not trained yet, draw, print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    torch.set_num_threads(processor.threads())
    given = {"epochs": EPOCHS, **_settings.explicit_settings(arguments)}
    out = Path(arguments.out)
    document = {
        **environment.describe(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["fused-resnet", *arguments.typed]),
        "data": Path(arguments.data).name,
    }

    def written(histories: dict[story.Network, list[dict[str, Any]]]) -> None:
        settings = {key: value for key, value in given.items() if key not in ("data", "out")}
        story.save(out, histories, {**document, "settings": {**story.PAPER, **settings}})

    try:
        base = training.Settings(**{"model": "cifar_plain20", **story.PAPER, **given})
        histories = story.run(base, arguments.networks, reporter(sys.stderr), written)
    except MissingPackageError:
        raise
    except training.DivergedError as error:
        print(f"fused-resnet: story: {error}", file=sys.stderr)
        return 1
    except (training.TrainingError, ValueError) as error:
        raise UsageError(f"story: {str(error).splitlines()[0]}") from None
    console().print(_table(histories))
    print(f"{out / 'story.png'} and {out / 'story.json'}")
    return 0


def _table(histories: dict[story.Network, list[dict[str, Any]]]) -> Table:
    table = Table(title="final errors, %", title_justify="left")
    table.add_column("network")
    for name in ("training", "test", "least test", "training images/s"):
        table.add_column(name, justify="right")
    for (kind, depth), history in histories.items():
        errors = story.final_errors(history)
        speed = sorted(entry["images_per_s"] for entry in history)[len(history) // 2]
        cells = [f"{value:.2f}" for value in errors.values()]
        table.add_row(f"{kind}-{depth}", *cells, f"{speed:.0f}")
    return table


def _network(text: str) -> story.Network:
    try:
        return story.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
