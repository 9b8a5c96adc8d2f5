"""``fused-resnet verify``: every operation and network against float64."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from ..backends.availability import NAMES, use_backend
from ..bench import environment
from ..bench.results import save
from ..verify import LIMIT, ROUNDING, Row, verify_networks, verify_operations
from ..verify.networks import MODELS
from ..verify.operations import rows_of
from . import _matrix
from ._common import (
    DTYPES,
    UsageError,
    console,
    listed,
    one_of,
    own_network,
    print_json,
    progress,
    writable,
)


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Register the subcommand.

    Args:
        commands: Subparsers of the command line, to which the subcommand is added.
    """
    parser = commands.add_parser(
        "verify",
        description="Each row is an error relative to float64, next to PyTorch's own in the same "
        f"dtype. It passes at up to {LIMIT} times PyTorch's own, or {ROUNDING:g} units of the "
        "dtype's rounding. Exit code 1 if a row fails.",
    )
    parser.add_argument(
        "--models",
        type=listed(lambda text: text if text == "none" else own_network(text)),
        default=list(MODELS),
        metavar="M,...",
        help=f"networks, or none for the operations alone (default: {','.join(MODELS)})",
    )
    parser.add_argument(
        "--dtype",
        type=listed(one_of("dtype", DTYPES)),
        default=list(DTYPES),
        metavar="D,...",
        help=f"storage types (default: {','.join(DTYPES)})",
    )
    parser.add_argument(
        "--backend",
        type=one_of("backend", ("auto", *NAMES)),
        default="auto",
        help="the backend to verify (default: auto)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the rows to a file, or print JSON instead of the table",
    )
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="a table of every operation on every backend instead. Exit code 1 also if a backend "
        "has no device here; in a source checkout `python tests/verify_matrix.py` then runs the "
        "GPU's kernels on the CPU",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify and print.

    Args:
        arguments: Parsed command-line arguments of the subcommand.

    Returns:
        The exit status of the process.
    """
    to_stdout = arguments.json == "-"
    path = None
    if arguments.json and not to_stdout:
        try:
            path = writable(arguments.json)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"verify: --json: {error}") from None
    if arguments.matrix:
        cells = _matrix.measure(_dtypes(arguments))
        document = _matrix.document(cells)
    else:
        with use_backend(arguments.backend):  # fails before any work if it is unavailable
            pass
        rows = _verify(arguments)
        document = _document(rows, arguments.backend)
    if to_stdout:
        print_json(document)
    elif arguments.matrix:
        console().print(_matrix.table(cells))
    else:
        _show(rows)
    if path is not None:
        save(path, document)
    return 0 if document["passed"] else 1


def _dtypes(arguments: argparse.Namespace) -> list[torch.dtype]:
    return [getattr(torch, name) for name in arguments.dtype]


def _verify(arguments: argparse.Namespace) -> list[Row]:
    dtypes = _dtypes(arguments)
    models = [name for name in arguments.models if name != "none"]
    steps = {"float32", "float64"} & set(arguments.dtype)
    total = len(rows_of(dtypes, arguments.backend)) + len(models) * (1 + len(steps))
    with progress() as bar:
        task = bar.add_task("verify", total=total)

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)

        return list(
            itertools.chain(
                verify_operations(dtypes, arguments.backend, progress=advance),
                verify_networks(models, dtypes, arguments.backend, progress=advance),
            )
        )


def _document(rows: Sequence[Row], backend: str) -> dict[str, Any]:
    return {
        "passed": all(row.passed for row in rows),
        "backend": backend,
        "limit": LIMIT,
        "environment": environment.describe(),
        "rows": [row.as_dict() for row in rows],
    }


def _show(rows: Sequence[Row]) -> None:
    table = Table(title="error against float64, and PyTorch's own")
    for name in ("subject", "mode", "dtype", "format", "closest to its bound"):
        table.add_column(name)
    for name in ("error", "PyTorch's", "ratio", "result"):
        table.add_column(name, justify="right")
    for last, row in zip((None, *rows), rows, strict=False):
        if last is not None and last.subject != row.subject:
            table.add_section()
        table.add_row(
            row.subject,
            row.mode,
            row.dtype,
            row.memory_format,
            row.what,
            f"{row.error:.1e}",
            "" if row.pytorch_error is None else f"{row.pytorch_error:.1e}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "[green]pass[/]" if row.passed else "[bold red]FAIL[/]",
        )
    out = console()
    out.print(table)
    failed = sum(not row.passed for row in rows)
    out.print(f"{len(rows)} rows, {failed} failed", style="bold red" if failed else "bold green")
