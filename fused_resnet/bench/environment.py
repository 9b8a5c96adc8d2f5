"""The environment of a measurement: processor, versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..backends.availability import build_info
from ..tuning import processor

#: Environment variables that the package reads: name, when it is read, meaning.
VARIABLES = (
    ("FUSED_RESNET_ISA", "run", "force the instruction set of the CPU kernels"),
    ("FUSED_RESNET_TUNE", "run", "0, 1 or exhaustive: time the backends of a new call"),
    ("FUSED_RESNET_CACHE", "run", "file in which the tuner keeps its choices"),
    (
        "OMP_NUM_THREADS",
        "run",
        "size of PyTorch's thread pool, which the kernels share; "
        "set it where a container has a quota, which PyTorch doesn't see",
    ),
    ("FUSED_RESNET_CUDA", "build", "0, 1 or auto: build the CUDA kernels"),
    ("TORCH_CUDA_ARCH_LIST", "build", "architectures to compile the CUDA kernels for"),
    ("FUSED_RESNET_TEST_DATA", "tests", "folder with the CIFAR slice and trained networks"),
)


#: Distributions of the providers and networks of a benchmark.
_OTHERS = (
    "torchvision", "timm", "transformers", "segmentation_models_pytorch",
    "onnx", "onnxruntime", "openvino", "ncnn", "pnnx",
)  # fmt: skip


def cores() -> int:
    """Logical processors that this process may use, within its container's quota."""
    return processor.available()


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect a result; None for those not installed."""
    return {
        "fused_resnet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _OTHERS},
    }


def commit() -> str | None:
    """The commit of a source checkout, ``-dirty`` with local changes; None when installed."""
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie inside an unrelated repository.
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    # Results files of earlier runs are not part of what is measured.
    changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return f"{head}-dirty" if changed else head


def describe() -> dict[str, Any]:
    """The fields of a result row that describe the environment."""
    build = build_info()
    return {
        "device": processor.name(),
        "processors": cores(),
        "isa": build["isa"],
        "os": platform.platform(aliased=True, terse=True),
        "versions": versions(),
        "commit": commit(),
        # Other work on the machine, which explains outliers.
        "load": os.getloadavg()[0],
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
