"""Results of ``make gpu`` on one card: the JSON file, and its summary as text.

One document per card, ``benchmarks/results/gpu-<card>.json``:

============= ====================================================================================
``format``    :data:`FORMAT`
``device``    ``name``, ``capability``, ``memory_gib``, ``multiprocessors``, ``driver``
``versions``  of torch, CUDA, cuDNN, Triton, Python and this package
``phases``    ``name``, ``command``, ``status``, ``seconds``, ``summary``, ``log``: its last lines
``layers``    a row for each kernel of the roofline and each provider: ``fusion``, ``what``,
              ``batch``, ``precision``, ``provider``, ``status``, ``reason``, ``error``,
              ``median_us``, ``p20_us``, ``p80_us``, ``bound_us``; the fusions ``training`` and
              ``sweep`` are not of the roofline
``networks``  ``model``, ``batch``, ``precision``, ``provider``, ``graph``, ``status``, ``reason``,
              ``error``, ``median_ms``, ``p20_ms``, ``p80_ms``, ``images_per_s``, ``ratio``
``training``  as ``networks``, with ``memory_gib``
============= ====================================================================================

Besides ``commit``, ``command``, ``started``, ``seconds`` and ``tune``. ``benchmarks/gpu_window``
makes the document from its rows, which are in a file of their own. A provider's name may be
followed by a comma and a plan: ``triton, 128x64x64, 4 warps, 4 stages``.
It imports the standard library alone, since it also runs where the package could not be built.

A row's status is ``ok``, ``wrong`` (its result), ``failed``, ``unavailable`` or ``skipped``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1

#: This package's providers in order of preference for the roofline's measured column.
OWN = ("frozen", "packed", "cuda", "triton", "live")

_KEYS = ("device", "versions", "commit", "command", "phases", "layers", "networks", "training")

Document = dict[str, Any]
Row = dict[str, Any]


def file_name(device_name: str) -> str:
    """The name of a card's results file.

    Args:
        device_name: Name of the card, as CUDA gives it.
    """
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def load(path: Path) -> Document:
    """Read a results file.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a results file; the message says why.
        OSError: It can't be read.
    """
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path}: expected a results file of make gpu, got no JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a results file of make gpu, format {FORMAT}")
    missing = [key for key in _KEYS if key not in document]
    if missing:
        raise ValueError(f"{path}: expected a results file of make gpu, without {missing[0]!r}")
    return document


def measured_us(document: Document, *, fusion: str, batch: int, precision: str) -> dict[str, float]:
    """Median microseconds of each kernel by its description.

    Without fusion the kernels are PyTorch's; with fusion they are this package's, except for a pool
    by itself. Convolutions outside of fused blocks are those of the fusion "conv".

    Args:
        document: A results document.
        fusion: A key of :data:`fused_resnet.roofline.FUSIONS`.
        batch: Number of images.
        precision: A key of :data:`fused_resnet.roofline.ITEMSIZE`.
    """
    fusions = {"none": ("none",), "block": ("conv", "block")}.get(fusion, (fusion,))
    found: dict[str, float] = {}
    for provider in ("eager", *reversed(OWN)):
        for row in document["layers"]:
            shape = row["batch"], row["precision"], row["status"], row["provider"]
            alone = row["what"].startswith("maxpool")
            known = row["fusion"] in fusions or (alone and row["fusion"] == "none")
            if not known or shape != (batch, precision, "ok", provider):
                continue
            if provider != "eager" or fusion == "none" or alone:
                found[row["what"]] = row["median_us"]
    return found


def save(path: Path, document: Document) -> None:
    """Write a document atomically.

    Args:
        path: The file.
        document: The results document.
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


# The summary


def summary(document: Document) -> str:
    """A document as plain text.

    Args:
        document: Contents of a results file.
    """
    device, versions = document["device"], document["versions"]
    named = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    parts = [
        f"{device['name']}, capability {device['capability']}, {device['memory_gib']:.0f} GiB, "
        f"{device['multiprocessors']} multiprocessors, driver {device['driver']}\n"
        f"{named}\n"
        f"commit {document['commit']}; {document['command']}; "
        f"{document['started']}, {document['seconds']:.0f} s",
        _phases(document["phases"]),
        _layers(document["layers"]),
        _networks("Inference", document["networks"]),
        _networks("Training step", document["training"]),
        _complaints(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def passed(document: Document) -> bool:
    """Whether nothing failed and no result was wrong. Skipped rows are not failures.

    Args:
        document: Contents of a results file.
    """
    rows = [*document["layers"], *document["networks"], *document["training"]]
    return all(phase["status"] in ("passed", "skipped") for phase in document["phases"]) and all(
        row["status"] not in ("failed", "wrong") for row in rows
    )


def _phases(phases: Sequence[Row]) -> str:
    rows = [
        [phase["name"], phase["status"], f"{phase['seconds']:.0f} s", phase["summary"]]
        for phase in phases
    ]
    return "Phases\n" + _aligned([["phase", "status", "time", ""], *rows], right=(2,))


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``ratio``: eager's median over their own; None where either is missing.

    Args:
        rows: Rows of networks.
    """

    def cell(row: Row) -> tuple[Any, ...]:
        return row["model"], row["batch"], row["precision"], row["size"]

    base = {
        cell(row): row["median_ms"]
        for row in rows
        if row["provider"] == "eager" and not row["graph"] and row["status"] == "ok"
    }
    return [
        {
            **row,
            "ratio": base[cell(row)] / row["median_ms"]
            if row["status"] == "ok" and cell(row) in base
            else None,
        }
        for row in rows
    ]


def _layers(rows: Sequence[Row]) -> str:
    parts = []
    for fusion, batch, precision in _distinct(rows, "fusion", "batch", "precision"):
        mine = [
            row
            for row in rows
            if (row["fusion"], row["batch"], row["precision"]) == (fusion, batch, precision)
        ]
        columns = list(dict.fromkeys(_column(row) for row in mine))
        lines = [["layer", "bound", *columns]]
        for (what,) in _distinct(mine, "what"):
            cells: dict[str, Row] = {}
            for row in [row for row in mine if row["what"] == what]:
                cells[_column(row)] = _better(cells.get(_column(row)), row)
            bound = next(iter(cells.values()))["bound_us"]
            lines.append(
                [
                    what,
                    "" if bound is None else f"{bound:.1f}",
                    *(_time_of(cells.get(name)) for name in columns),
                ]
            )
        title = f"Layers, batch {batch}, {precision}, fusion {fusion}: microseconds"
        parts.append(f"{title}\n{_aligned(lines, right=range(1, 2 + len(columns)))}")
    return "\n\n".join(parts)


def _column(row: Row) -> str:
    """A provider, or the best of its plans."""
    name, _, plan = row["provider"].partition(", ")
    return f"{name}, best plan" if plan else name


def _better(one: Row | None, other: Row) -> Row:
    if one is None or one["status"] != "ok":
        return other
    if other["status"] != "ok":
        return one
    return min(one, other, key=lambda row: row["median_us"])


def _time_of(row: Row | None) -> str:
    plan = "" if row is None else row["provider"].partition(", ")[2]
    text = _cell(row, "median_us", ".1f")
    return f"{text} ({plan})" if plan and row is not None and row["status"] == "ok" else text


def _networks(title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [["network", "batch", "precision", "provider", "median ms", "img/s", "x eager"]]
    for row in rows:
        ratio = row.get("ratio")
        name = row["provider"] + (", graph" if row.get("graph") else "")
        lines.append(
            [
                row["model"],
                str(row["batch"]),
                row["precision"],
                name,
                _cell(row, "median_ms", ".3f"),
                f"{row['images_per_s']:.0f}" if row["status"] == "ok" else "",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return f"{title}\n{_aligned(lines, right=(1, 4, 5, 6))}"


def _complaints(document: Document) -> str:
    lines = []
    for phase in document["phases"]:
        if phase["status"] not in ("passed", "skipped"):
            lines.append(f"{phase['name']}: {phase['status']}: {phase['command']}")
            lines += [f"    {line}" for line in phase["log"]]
    for row in (*document["layers"], *document["networks"], *document["training"]):
        if row["status"] != "ok":
            subject = row.get("what") or row.get("model")
            where = f"{subject}, batch {row['batch']}, {row['precision']}, {row['provider']}"
            graph = ", graph" if row.get("graph") else ""
            lines.append(f"{where}{graph}: {row['status']}: {row['reason']}")
    return "Not passed or not timed\n" + "\n".join(lines) if lines else ""


def _cell(row: Row | None, key: str, form: str) -> str:
    if row is None:
        return ""
    return format(row[key], form) if row["status"] == "ok" else str(row["status"])


def _distinct(rows: Iterable[Row], *keys: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def _aligned(lines: Sequence[Sequence[str]], right: Iterable[int]) -> str:
    to_the_right = set(right)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in to_the_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
