"""``fused-resnet models``: the names of networks."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from ..models import hub, sources
from ._common import print_json


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "models",
        description="Lists the names of networks that bench, tune, freeze and the other commands "
        "take. torchvision's may be written with torchvision: before them; timm has hundreds, of "
        "which --timm lists those that its own list has.",
    )
    parser.add_argument("--timm", action="store_true", help="list timm's networks too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def names(timm: bool) -> dict[str, list[str]]:
    """The names by source.

    Args:
        timm: Whether to import timm, which has to be installed, for its list.
    """
    found = {
        "torchvision's": list(sources.MODELS),
        "of the paper, for CIFAR": list(sources.CIFAR),
        "transformers'": [f"hf:{name}" for name in (*hub.RESNETS, *hub.REGNETS)],
    }
    if timm:
        found["timm's"] = [f"timm:{name}" for name in sources.library("timm").list_models()]
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print the names, one a line.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    found = names(arguments.timm)
    if arguments.json:
        print_json(found)
        return 0
    for source, listed in found.items():
        print(f"{source}:")
        for name in listed:
            print(f"  {name}")
    if not arguments.timm:
        installed = importlib.util.find_spec("timm") is not None
        how = "--timm lists them" if installed else "pip install timm"
        print(f"timm's: timm:NAME, for example timm:resnet50 ({how})")
    return 0
