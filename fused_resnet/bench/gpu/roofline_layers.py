"""The roofline's other kernels at batch 256: whole blocks, and PyTorch's operators one by one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from .. import gpu_layers
from .cases import Case, Row, Target


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """A case for each kernel that :mod:`.layers` does not time.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    model, batch, size = ("resnet18", 1, 32) if target.tiny else ("resnet50", 256, 224)
    found = []
    for cell in gpu_layers.cells(model, batch, precision, size):
        about = {key: cell[key] for key in ("model", "batch", "precision", "fusion", "what")}
        run = functools.partial(_run, target, cell)
        found.append(Case(f"{cell['fusion']}: {cell['what']}", run, {"kind": "time", **about}))
    # In a rehearsal a single operator shows the path; a block's takes the simulator long.
    return found[-1:] if target.tiny else found


def _run(target: Target, cell: dict[str, Any]) -> Iterator[Row]:
    answer = gpu_layers.run(**cell, device=target.device.type, rounds=1 if target.tiny else 5)
    for row in answer["rows"]:
        found: Row = {"kind": "time", "unit": "us", "graph": False, "bound": row["bound_us"]}
        found |= {key: row[key] for key in ("model", "batch", "precision", "fusion", "what")}
        found |= {key: row[key] for key in ("provider", "status", "reason", "error")}
        if row["status"] == "ok":
            found |= {key: row[f"{key}_us"] for key in ("median", "p20", "p80")}
            found["samples"] = row["samples"]
        yield found
    if answer["lost"]:
        raise RuntimeError("the CUDA context is unusable")
