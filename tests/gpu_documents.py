"""Results documents of ``make gpu`` with invented numbers."""

from __future__ import annotations

from typing import Any

from fused_resnet.bench import gpu_results


def layer(provider: str, **more: Any) -> dict[str, Any]:
    row = {"model": "resnet50", "fusion": "conv", "what": "conv 1x1", "batch": 256}
    row |= {"precision": "bfloat16", "provider": provider, "status": "ok", "reason": ""}
    return {**row, "error": 0.0, "median_us": 99.94, "bound_us": 61.4, **more}


def network(provider: str, **more: Any) -> dict[str, Any]:
    row = {"model": "resnet50", "batch": 256, "precision": "bfloat16", "provider": provider}
    row |= {"graph": False, "status": "ok", "reason": "", "error": 0.0, "median_ms": 12.5}
    return {**row, "images_per_s": 20480.0, "ratio": 1.25, **more}


def document(**parts: Any) -> dict[str, Any]:
    device = {"name": "A Card 80GB", "capability": "9.0", "memory_gib": 79.1}
    phase = {"name": "build", "status": "passed", "seconds": 99.0, "summary": "built"}
    return {
        "format": gpu_results.FORMAT,
        "device": {**device, "multiprocessors": 132, "driver": "1.2"},
        "versions": {"torch": "2", "triton": None},
        "commit": "abc",
        "command": "python benchmarks/gpu.py",
        "started": "a day",
        "seconds": 321.0,
        "phases": [{**phase, "command": "python setup.py", "log": []}],
        "layers": [layer("eager", median_us=200.0), layer("packed")],
        "networks": [network("eager"), network("frozen", graph=True)],
        "training": [],
        **parts,
    }
