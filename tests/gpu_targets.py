"""Cells that fail in every way, which tests/bench/test_gpu_bench.py measures in child processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def cell(providers: list[str], **about: Any) -> dict[str, Any]:
    """A row for each provider, up to the first that breaks something."""
    rows = []
    for name in providers:
        kind, _, graph = name.partition("+")
        row = {**about, "provider": kind, "graph": bool(graph), "status": "ok", "reason": ""}
        if name == "raises":
            raise RuntimeError("the whole cell failed")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hangs":
            time.sleep(60)
        if name == "loses":
            return {"rows": [{**row, "status": "failed", "reason": "CUDA error"}], "lost": True}
        rows.append({**row, "median_ms": 10.0 if kind == "eager" else 4.0, "pid": os.getpid()})
    return {"rows": rows, "lost": False}
