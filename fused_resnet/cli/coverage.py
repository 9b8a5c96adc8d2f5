"""``fused-resnet coverage``: how much of other libraries' networks runs fused."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..bench import environment, zoo
from ..bench.coverage import Coverage, count, total
from ..models.optional import MissingPackageError
from ..models.sources import UnknownNetworkError
from ._common import UsageError, console, print_json, progress


@dataclass(frozen=True)
class Row:
    """The counts of one network.

    Attributes:
        family: Title of its family.
        network: Name of the network.
        counts: The counts.
    """

    family: str
    network: str
    counts: Coverage


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "coverage",
        description="Builds networks with random weights, fuses them, and counts groups in eval "
        "mode; every fused group has one batch norm, so batch norms are counted. Without names, "
        "all networks of torchvision with batch norm, timm's residual ones, transformers' ResNets, "
        "RegNets and DETR backbones, and segmentation-models-pytorch on ResNet encoders, with one "
        "row per family. Needs no weights and computes nothing; takes a few minutes for all.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="torchvision:resnet50, torchvision:resnet50/fpn, timm:resnet50, "
        "timm:resnet50/features_only, hf:microsoft/resnet-50, hf:detr/timm/resnet50, "
        "smp:Unet/resnet34, and so on",
    )
    parser.add_argument("--json", action="store_true", help="print JSON with one row per network")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    missing: list[str] = []
    rows = _named(arguments.models) if arguments.models else _all(missing)
    if arguments.json:
        print_json(_document(rows, missing, arguments.typed))
        return 0
    out = console()
    out.print(_table(rows, by_family=not arguments.models), highlight=False)
    for line in missing:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _named(names: list[str]) -> list[Row]:
    try:
        return [_row(zoo.family_of(name), name) for name in names]
    except UnknownNetworkError as error:
        raise UsageError(f"coverage: {error}") from None


def _all(missing: list[str]) -> list[Row]:
    found = list(_families(missing))
    rows = []
    with progress() as bar:
        task = bar.add_task("", total=sum(len(names) for _, names in found))
        for title, names in found:
            for name in names:
                bar.update(task, description=name)
                rows.append(_row(title, name))
                bar.update(task, advance=1)
    return rows


def _families(missing: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Titles and networks; adds one line to ``missing`` for each library not installed."""
    for family in zoo.FAMILIES:
        try:
            yield family.title, family.names()
        except MissingPackageError as error:
            line = f"skipped: {error}"
            if line not in missing:
                missing.append(line)


def _row(family: str, name: str) -> Row:
    row = Row(family, name, count(zoo.build_without_memory(name)))
    gc.collect()  # frees the network: its modules refer to each other in cycles
    return row


def _document(rows: list[Row], missing: list[str], typed: list[str]) -> dict[str, Any]:
    return {
        "command": " ".join(["fused-resnet", *typed]),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "missing": missing,
        "networks": [
            {"family": row.family, "network": row.network, **row.counts.as_dict()} for row in rows
        ],
    }


def _table(rows: list[Row], by_family: bool) -> Table:
    kept: dict[str, list[Row]] = {}
    for row in rows:
        kept.setdefault(row.family if by_family else row.network, []).append(row)
    table = Table(title="batch norms that run in a fused group, in eval")
    table.add_column("networks" if by_family else "network")
    if by_family:
        table.add_column("count", justify="right")
    table.add_column("groups", justify="right")
    table.add_column("fused", justify="right")
    table.add_column("why not the rest")
    for title, members in kept.items():
        counts = total(row.counts for row in members)
        number = [str(len(members))] if by_family else []
        why = "\n".join(f"{times}: {reason}" for reason, times in counts.left.items())
        table.add_row(title, *number, str(counts.groups), str(counts.fused), escape(why))
    table.add_section()
    counts = total(row.counts for row in rows)
    number = [str(len(rows))] if by_family else []
    table.add_row("all", *number, str(counts.groups), str(counts.fused), "")
    return table
