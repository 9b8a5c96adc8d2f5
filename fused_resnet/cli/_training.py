"""``fused-resnet bench --training``: training steps, each provider in a process of its own."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..bench import environment, harness, results, training
from ._common import UsageError, progress

#: Phases of a step, in order.
PHASES = ("forward", "backward", "optimizer")


def providers_of(names: Sequence[str], default: Sequence[str]) -> list[str]:
    """The providers of training that the option ``--providers`` names.

    Args:
        names: Names that were parsed for inference, whose names are a superset of those here.
        default: Providers that inference runs if nothing was asked for.

    Raises:
        UsageError: A provider that can't train.
    """
    if list(names) == list(default):
        return list(training.DEFAULT)
    unknown = [name for name in names if name not in training.NAMES]
    if unknown:
        raise UsageError(
            f"bench: --training: --providers: unknown provider {unknown[0]!r}; expected one of "
            f"{', '.join(training.NAMES)}"
        )
    return list(names)


def measure(arguments: argparse.Namespace, providers: Sequence[str]) -> list[results.Row]:
    """Rows of one network at each batch, with a progress bar.

    Args:
        arguments: Parsed command-line arguments of ``fused-resnet bench``.
        providers: Names of the providers, each one of :data:`fused_resnet.bench.training.NAMES`.
    """
    rows: list[results.Row] = []
    for batch in arguments.batch:
        label = f"{subject_of(arguments)}, batch {batch}"
        with tempfile.TemporaryDirectory(prefix="fused-resnet-") as folder, progress() as bar:
            task = bar.add_task(f"{label}: float64 step", total=None)
            try:
                training.write_problem(
                    Path(folder), arguments.model, batch, arguments.size, arguments.trainable
                )
            except ValueError as error:
                raise UsageError(f"bench: --trainable: {error}") from None
            entries = training.entries(providers, arguments.model, arguments.dtype, Path(folder))
            bar.update(task, total=harness.steps(entries, arguments.rounds))

            def advance(provider: str, action: str, label: str = label) -> None:
                bar.update(task, advance=1, description=f"{label}: {provider}, {action}")  # noqa: B023

            measurements = harness.compare(
                entries,
                threads=arguments.threads,
                rounds=arguments.rounds,
                jobs=environment.cores(),
                progress=advance,
            )
        command = shlex.join(["fused-resnet", *arguments.typed])
        rows += results.rows(
            measurements,
            subject=subject_of(arguments),
            batch=batch,
            dtype=arguments.dtype,
            size=arguments.size,
            threads=arguments.threads,
            peers=training.PEERS,
            environment={**environment.describe(), "command": command, "mode": "training"},
        )
    return rows


def subject_of(arguments: argparse.Namespace) -> str:
    """What is trained: the network, and the parts of it that learn if not all do.

    Args:
        arguments: Parsed command-line arguments of ``fused-resnet bench``.
    """
    only = " and ".join(arguments.trainable)
    return f"{arguments.model}, only {only}" if only else str(arguments.model)


def table_of(rows: Sequence[results.Row], title: str) -> Table:
    """The rows for a terminal.

    Args:
        rows: Rows of the table, from :func:`measure`.
        title: Title of the table.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption="Memory is the peak beyond the network, the batch and libraries.",
        caption_justify="left",
    )
    for name in ("batch", "provider"):
        table.add_column(name)
    baseline = rows[0]["baseline"] if rows else results.BASELINE
    for name in ("ms", "p20 to p80", "img/s", f"x {baseline}", "x best peer", "added MiB", *PHASES):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["batch"]):
            table.add_section()
        last = row["batch"]
        cells = [f"[red]{row['status']}[/]"]
        if row["status"] == "ok":
            step = sum(row[phase] for phase in PHASES)
            cells = [
                f"{row['median_ms']:.1f}",
                f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
                f"{row['images_per_s']:.1f}",
                _ratio(row["ratio"]),
                _ratio(row["ratio_to_best_peer"]),
                "" if row["added_mib"] is None else f"{row['added_mib']:.0f}",
                *(f"{row[phase] / step:.0%}" for phase in PHASES),
            ]
        table.add_row(str(row["batch"]), row["provider"], *cells)
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def provider_names(inference: Sequence[str]) -> list[str]:
    """The names that ``--providers`` takes, those of inference and of training.

    Args:
        inference: Names of the providers of inference.
    """
    return list(dict.fromkeys([*inference, *training.NAMES]))
