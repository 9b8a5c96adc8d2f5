"""Result rows: built from measurements, printed as a table, stored in JSON files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tuning.atomic_file import replacing
from .harness import Measurement

if TYPE_CHECKING:
    from rich.table import Table

#: The provider that ratios are relative to.
BASELINE = "channels_last"

Row = dict[str, Any]


def rows(
    measurements: Sequence[Measurement],
    *,
    subject: str,
    batch: int,
    dtype: str,
    size: int,
    threads: int,
    baseline: str = BASELINE,
    peers: Collection[str] = (),
    environment: dict[str, Any],
) -> list[Row]:
    """One self-contained row per measurement.

    ``ratio`` is the baseline's median time over this one's: above 1 is faster. It is None without
    a baseline in the same run. ``ratio_to_best_peer`` is the same for the fastest of ``peers``.
    ``cores`` is the processor time of all threads over elapsed time, which shows whether a provider
    used exactly its threads. ``peak_mib`` is the peak resident memory of its process in the rounds,
    ``base_mib`` the memory with PyTorch imported.

    Args:
        measurements: The outcomes of one run.
        subject: Name of the network or operation.
        batch: Number of images.
        dtype: Storage type, without ``torch.``.
        size: Height and width of the images.
        threads: Number of threads of each process.
        baseline: The provider of the ratios' numerator.
        peers: The providers that are not this package's.
        environment: Fields that are added to each row.
    """
    medians = {m.name: statistics.median(m.times) for m in measurements if _timed(m)}
    base = medians.get(baseline)
    best = min((name for name in peers if name in medians), key=medians.__getitem__, default=None)
    result = []
    for m in measurements:
        row: Row = {
            "subject": subject,
            "provider": m.name,
            "batch": batch,
            "dtype": dtype,
            "size": size,
            "status": m.status,
            "reason": m.reason,
            "error": m.error,
            "threads": m.threads if m.threads is not None else threads,
            "baseline": baseline,
            "best_peer": best,
            "build_s": m.build_seconds,
        }
        if _timed(m):
            median = medians[m.name]
            passed = sum(end - start for start, end in m.rounds)
            p20, p80 = (quantile(m.times, q) for q in (0.2, 0.8))
            row |= {
                "median_ms": median * 1e3,
                "p20_ms": p20 * 1e3,
                "p80_ms": p80 * 1e3,
                "images_per_s": batch / median,
                "ratio": None if base is None else base / median,
                "ratio_to_best_peer": None if best is None else medians[best] / median,
                "cores": m.cpu_seconds / passed if passed else None,
                "peak_mib": _mib(m.peak_bytes),
                "base_mib": _mib(m.base_bytes),
                "added_mib": _added(m),
                "rounds": len(m.rounds),
                "samples": len(m.times),
            }
        # The row's own numbers last: `cores` is what was measured.
        result.append({**environment, **row, **m.details})
    return result


def _mib(value: int | None) -> float | None:
    return None if value is None else value / 2**20


def _added(m: Measurement) -> float | None:
    """The most memory that was resident beyond PyTorch's own libraries, in MiB.

    Of training, beyond the network and the batch too.
    """
    if m.peak_bytes is None or m.base_bytes is None:
        return None
    return (m.peak_bytes - m.base_bytes) / 2**20


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile, interpolated linearly between the two nearest values.

    Args:
        values: Numbers, at least one.
        q: Between 0 and 1.
    """
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows as a table for a terminal.

    Args:
        rows: Result rows of one subject.
        title: Title of the table.
    """
    from rich import box  # here: files are also written where rich is not installed
    from rich.table import Table

    baseline = rows[0]["baseline"] if rows else BASELINE
    peer = next((row["best_peer"] for row in rows if row["best_peer"]), None)
    # Narrow enough for 80 columns with every digit.
    result = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        caption=f"x base: times the speed of {baseline}"
        + (f"; x peer: of the fastest other ({peer})" if peer else ""),
        caption_justify="left",
    )
    result.add_column("batch")
    result.add_column("provider", no_wrap=True)
    for name in ("ms", "p20-p80", "img/s", "x base", "x peer", "error", "MiB", "cores"):
        result.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and row["batch"] != last:
            result.add_section()
        last = row["batch"]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        if row["status"] == "ok":
            cells = [
                _digits(row["median_ms"]),
                f"{_digits(row['p20_ms'])}-{_digits(row['p80_ms'])}",
                f"{row['images_per_s']:.1f}",
                _number(row["ratio"], ".2f"),
                _number(row["ratio_to_best_peer"], ".2f"),
                error,
                _number(row["peak_mib"], ".0f"),
                _number(row["cores"], ".2f"),
            ]
        else:
            cells = [f"[red]{row['status']}[/]", "", "", "", "", error, "", ""]
        result.add_row(str(row["batch"]), row["provider"], *cells)
    return result


def _digits(ms: float) -> str:
    """Milliseconds with three digits or more."""
    return f"{ms:.{2 if ms < 10 else 1 if ms < 1000 else 0}f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


#: Share of the median by which p80 may be above p20, in measurements on an idle machine.
WIDE = 0.2


def doubts(rows: Sequence[Row]) -> list[str]:
    """Why the numbers may not be trusted: one line for a loaded machine, one for wide spreads.

    Args:
        rows: Result rows.
    """
    timed = [row for row in rows if row["status"] == "ok"]
    found = []
    load = max((row.get("load") or 0 for row in timed), default=0)
    processors = min((row.get("processors") or 0 for row in timed), default=0)
    # What the benchmark itself leaves in the average of a minute is one process.
    if processors and load > processors / 2 + max(row["threads"] for row in timed):
        found.append(
            f"the machine was loaded (load {load:.1f} on {processors} processors): measure again"
        )
    wide = [row for row in timed if row["p80_ms"] - row["p20_ms"] > WIDE * row["median_ms"]]
    if wide:
        names = ", ".join(dict.fromkeys(f"{row['provider']}" for row in wide))
        found.append(f"times spread widely, p20 to p80 over {WIDE:.0%} of the median: {names}")
    return found


def complaints(rows: Sequence[Row]) -> list[str]:
    """One line for each provider that was not timed.

    Args:
        rows: Result rows.
    """
    return [
        "{subject}, batch {batch}, {provider}: {status}: {reason}".format(**row)
        for row in rows
        if row["status"] != "ok"
    ]


def save(path: Path, content: Any) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file.
        content: Content to write.
    """
    text = json.dumps(content, indent=1) + "\n"
    with replacing(path) as part:
        part.write_text(text)


def load(path: Path) -> list[Row]:
    """Read the rows of a results file.

    Args:
        path: A file of :func:`save`.
    """
    result: list[Row] = json.loads(path.read_text())
    return result


def _timed(m: Measurement) -> bool:
    return m.status == "ok" and bool(m.times)
