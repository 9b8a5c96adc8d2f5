"""The results file of a card, made from the rows: what the roofline and the summary read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .rows import BAD

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

#: The results file's words for the statuses of rows.
_PHASE = {"ok": "passed", "wrong": "failed", "failed": "failed"}


def results_format() -> ModuleType:
    """The module of the results' format, loaded from its file: the package may not be built."""
    path = ROOT / "fused_resnet" / "bench" / "gpu_results.py"
    spec = importlib.util.spec_from_file_location("gpu_results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def document(rows: Sequence[Row], head: Row) -> Row:
    """A results document.

    Args:
        rows: All rows of a window.
        head: Its keys that no row has: ``device``, ``versions``, ``commit``, ``command``,
            ``started``, ``seconds`` and ``tune``.
    """
    timed = [row for row in rows if row["kind"] == "time"]
    networks = [_network(row) for row in timed if row.get("unit") == "ms" or _of_network(row)]
    found = {"format": results_format().FORMAT, **head, "phases": phases(rows)}
    found["layers"] = [_layer(row) for row in timed if row.get("fusion")]
    for key, words in (("networks", "inference of "), ("training", "training step of ")):
        chosen = [row for row in networks if row["what"].startswith(words)]
        found[key] = results_format().with_ratios(
            [{**row, "model": row["what"].removeprefix(words)} for row in chosen]
        )
    return found


def _of_network(row: Row) -> bool:
    return str(row.get("what", "")).startswith(("inference of ", "training step of "))


def _layer(row: Row) -> Row:
    found = {key: row.get(key) for key in ("model", "fusion", "what", "batch", "precision")}
    found |= {"model": row.get("model", "resnet50"), "provider": row.get("provider", "")}
    found |= {"status": row["status"], "reason": row.get("reason", ""), "error": row.get("error")}
    found |= {"bound_us": row.get("bound"), "graph": bool(row.get("graph"))}
    return found | {f"{key}_us": row[key] for key in ("median", "p20", "p80") if key in row}


def _network(row: Row) -> Row:
    found = {key: row.get(key) for key in ("what", "batch", "precision", "provider", "status")}
    found |= {"graph": False, "size": 224, "reason": row.get("reason", "")}
    found |= {"error": row.get("error"), "memory_gib": row.get("memory_gib")}
    found |= {f"{key}_ms": row[key] for key in ("median", "p20", "p80") if key in row}
    return found | ({"images_per_s": row["images_per_s"]} if "images_per_s" in row else {})


def phases(rows: Sequence[Row]) -> list[Row]:
    """One entry for each note, each kind of check, and each file of tests."""
    found = [_of_note(row) for row in rows if row["kind"] == "note"]
    found += [
        _of_machine(row) for row in rows if row["kind"] == "time" and row["step"] == "machine"
    ]
    found += _counted(
        [row for row in rows if row["kind"] == "check"],
        lambda row: f"checks: {row.get('backend')} {row.get('operation')}",
        lambda row: f"{row.get('what')}, {row.get('precision')}, {row.get('plan', '')}",
    )
    found += _counted(
        [row for row in rows if row["kind"] == "test"],
        lambda row: f"tests: {Path(str(row.get('test')).split('::')[0]).stem}",
        lambda row: str(row.get("test")),
    )
    return found


def _of_note(row: Row) -> Row:
    name = f"{row['step']}: {row['case']}" if row["case"] else row["step"]
    found = {"name": name, "status": _PHASE.get(row["status"], "skipped")}
    found |= {"seconds": float(row.get("seconds", 0.0))}
    found |= {"summary": (row.get("reason") or row["summary"])[:160]}
    return found | {"command": row.get("command", ""), "log": list(row.get("log", []))}


def _of_machine(row: Row) -> Row:
    rate = next(
        (f"{row[k]:.3g} {k.replace('_per_', '/').upper()}" for k in row if "_per_s" in k), ""
    )
    found = {"name": f"machine: {row['what']}", "status": _PHASE.get(row["status"], "skipped")}
    return found | {"seconds": 0.0, "summary": rate, "command": "", "log": []}


def _counted(
    rows: Sequence[Row], name: Callable[[Row], str], subject: Callable[[Row], str]
) -> list[Row]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    found = []
    for title, group in groups.items():
        counts: dict[str, int] = {}
        for row in group:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        bad = [row for row in group if row["status"] in BAD]
        good = any(row["status"] == "ok" for row in group)
        entry: Row = {"name": title, "seconds": sum(row.get("seconds", 0.0) for row in group)}
        entry["status"] = "failed" if bad else "passed" if good else "skipped"
        entry["summary"] = ", ".join(f"{n} {status}" for status, n in counts.items())
        entry |= {"command": "", "log": [f"{subject(r)}: {r.get('reason')}" for r in bad][:60]}
        found.append(entry)
    return found
