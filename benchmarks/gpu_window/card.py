"""What is known before anything runs: the card, the tools of a build, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import commands

ROOT = Path(__file__).resolve().parents[2]

#: In a process of its own: the parent keeps no CUDA context.
_PROBE = """
import json, torch
if torch.version.cuda is None:
    print(json.dumps({"missing": f"a CUDA build of torch, this is {torch.__version__}"}))
elif not torch.cuda.is_available():
    print(json.dumps({"missing": "a GPU: PyTorch sees no CUDA device"}))
else:
    p = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": p.name, "capability": f"{p.major}.{p.minor}",
        "memory_gib": p.total_memory / 2**30, "multiprocessors": p.multi_processor_count}))
"""

#: In the place of a card in a rehearsal.
REHEARSED = {
    "name": "rehearsal", "capability": "9.0", "memory_gib": 0.0, "multiprocessors": 0,
    "driver": None,
}  # fmt: skip


def missing() -> list[str]:
    """What a window cannot do without, and this machine lacks."""
    found = [
        f"{name} (pip install '{name}{least}')"
        for name, least in (("torch", ">=2.11"), ("setuptools", ">=77"), ("pytest", ">=8"),
                            ("pybind11", ">=2"))
        if version(name) < tuple(map(int, least[2:].split(".")))
    ]  # fmt: skip
    if toolkit() is None:
        found.append("nvcc with its headers (set CUDA_HOME)")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        found.append("a C++ compiler (g++, or set CXX)")
    return found


def describe() -> dict[str, Any]:
    """The card and the processor.

    Raises:
        ValueError: There is no card; the message says what is missing.
    """
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise ValueError(f"a torch that can be imported: {lines[-1]}") from None
    if "missing" in found:
        raise ValueError(found["missing"])
    query = ("--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**found, "driver": commands.output_of("nvidia-smi", *query), **processor()}


def processor() -> dict[str, Any]:
    """The processor and its cores."""
    name = platform.processor() or platform.machine()
    return {"processor": name, "cores": len(os.sched_getaffinity(0))}


def version(distribution: str) -> tuple[int, ...]:
    """The first two numbers of its version; empty if it is not installed.

    Args:
        distribution: Its name.
    """
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def toolkit() -> str | None:
    """The folder of the CUDA toolkit, found as in setup.py."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        places.append(str(Path(nvcc).resolve().parents[1]))
    for place in places:
        if place and Path(place, "bin/nvcc").exists():
            return place
    return None


def versions(home: str | None) -> dict[str, str | None]:
    """Of this package, Python and nvcc, and what is installed of torch and Triton.

    Args:
        home: Folder of the CUDA toolkit; None for none.
    """
    nvcc = commands.output_of(str(Path(home, "bin", "nvcc")), "--version") if home else None
    text = (ROOT / "fused_resnet" / "_version.py").read_text()
    found: dict[str, str | None] = {"fused_resnet": text.split('"')[-2]}
    found |= {"python": platform.python_version()}
    found |= {"nvcc": nvcc.split("release ")[-1].split(",")[0] if nvcc else None}
    for name in ("torch", "triton", "torchvision"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of the checkout; None without one."""
    command = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return commands.output_of("git", "-C", str(ROOT), *command)
