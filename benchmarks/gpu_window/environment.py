"""The variables of every process of a window, set before any of them starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(
    capability: str,
    work: Path,
    toolkit: str | None,
    *,
    rehearse: bool,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """All variables.

    Args:
        capability: Of the card, as ``"9.0"``: the build is for it alone.
        work: Folder of the caches.
        toolkit: Folder of the CUDA toolkit; None for none.
        rehearse: Whether no card is there.
        inherited: Those of this process.
    """
    paths = [str(ROOT), str(ROOT / "benchmarks"), inherited.get("PYTHONPATH", "")]
    found = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "FUSED_RESNET_CUDA": "0" if rehearse else "1",
        # Kernels for this card, and portable ones for the CPU: the rest of the build's time is not
        # spent on what is not measured.
        "FUSED_RESNET_ISAS": "portable",
        "TORCH_CUDA_ARCH_LIST": capability,
        # Forced backends are measured. A job whose subject is the tuner sets it to 1.
        "FUSED_RESNET_TUNE": "0",
        "FUSED_RESNET_CACHE": str(work / "tuning.json"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
    }
    if rehearse:
        found["OMP_NUM_THREADS"] = "1"
    else:
        found["FUSED_RESNET_REQUIRE_GPU"] = "1"
    if toolkit is not None:
        found["CUDA_HOME"] = toolkit
    return found
