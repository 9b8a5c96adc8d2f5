"""Peak resident memory of this process since a reset; on Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


def reset_peak() -> None:
    """Free unused memory, and restart :func:`peak_bytes` from the remaining resident memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS


def peak_bytes() -> int | None:
    """Peak resident bytes since :func:`reset_peak`, the kernel's ``VmHWM``; None if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
