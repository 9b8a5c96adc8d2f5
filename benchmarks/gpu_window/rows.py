"""The rows of a window: what each kind must have, and a file that loses none of them.

A row is one line of JSON. All have ``kind``, ``step``, ``case``, ``status`` and ``t``, the seconds
since the window began, and those that are not ok a ``reason``:

========== =========================================================================================
``note``   what is known of the machine, the build and each step: ``summary``, and ``log`` where a
           command failed
``check``  an operation against float64: ``operation``, ``backend``, ``what``, ``plan``,
           ``precision``, ``error``, ``limit``
``time``   ``what``, ``provider``, ``batch``, ``precision``, ``unit``, ``median``, ``p20``, ``p80``,
           ``samples``
``test``   a test of the suite: ``test``, ``seconds``
========== =========================================================================================
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: ``wrong``: beyond its limit. ``cut``: its time was over while it ran; ``skipped``: before.
STATUSES = ("ok", "wrong", "failed", "unavailable", "skipped", "cut")

#: Statuses that make a window fail.
BAD = ("wrong", "failed")

_TEXT, _NUMBER = (str,), (int, float)

_ALWAYS = {"kind": _TEXT, "step": _TEXT, "case": _TEXT, "status": _TEXT, "t": _NUMBER}
_OF_KIND: dict[str, dict[str, tuple[type, ...]]] = {
    "note": {"summary": _TEXT},
    "check": {
        "operation": _TEXT, "backend": _TEXT, "what": _TEXT, "plan": _TEXT, "precision": _TEXT,
    },
    "time": {"what": _TEXT, "provider": _TEXT, "batch": (int,), "precision": _TEXT, "unit": _TEXT},
    "test": {"test": _TEXT, "seconds": _NUMBER},
}  # fmt: skip
_WHERE_OK: dict[str, tuple[str, ...]] = {
    "check": ("error", "limit"),
    "time": ("median", "p20", "p80", "samples"),
}


def problems(row: Row) -> list[str]:
    """What is wrong with a row; empty for a good one.

    Args:
        row: Any dictionary.
    """
    kind, status = row.get("kind"), row.get("status")
    found = []
    if kind not in _OF_KIND:
        return [f"kind: expected one of {', '.join(_OF_KIND)}, got {kind!r}"]
    if status not in STATUSES:
        found.append(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    # A case that never reported has no more than its name.
    partial = status in ("failed", "skipped", "cut", "unavailable") and kind != "note"
    for key, types in (_ALWAYS | ({} if partial else _OF_KIND[kind])).items():
        if not isinstance(row.get(key), types) or isinstance(row.get(key), bool):
            found.append(f"{key}: expected {types[0].__name__}, got {row.get(key)!r}")
    if status == "ok":
        for key in _WHERE_OK.get(kind, ()):
            value = row.get(key)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                found.append(f"{key}: expected a finite number, got {value!r}")
    elif not row.get("reason"):
        found.append(f"reason: expected one, as the status is {status}")
    return found


class RowFile:
    """Appends rows to a file, each on disk before the call returns.

    Args:
        path: The file; what it has is kept.
        elapsed: Seconds since the window began.
    """

    def __init__(self, path: Path, elapsed: Callable[[], float]) -> None:
        self.path, self._elapsed = path, elapsed
        self.rows: list[Row] = []
        self._file = path.open("a")
        self._lock = threading.Lock()  # rows come from the threads of several jobs

    def add(self, row: Row) -> Row:
        """Write a row; one that is malformed is kept as a failure that says why.

        Args:
            row: Without its time.
        """
        with self._lock:
            return self._add({**row, "t": round(self._elapsed(), 3)})

    def _add(self, row: Row) -> Row:
        wrong = problems(row)
        if wrong:
            row = {
                "kind": "note", "step": str(row.get("step")), "case": str(row.get("case")),
                "status": "failed", "reason": "malformed row: " + "; ".join(wrong),
                "summary": repr(row)[:2000], "t": row["t"],
            }  # fmt: skip
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return row

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off by a kill is left out.

    Args:
        path: A file that :class:`RowFile` has written.
    """
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
