"""Peak resident memory of this process, from a moment on. Linux; None elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path


def reset_peak() -> None:
    """Give back what is free, and let :func:`peak_bytes` start anew from what remains."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS


def peak_bytes() -> int | None:
    """The most memory that was resident since :func:`reset_peak`: ``VmHWM`` of the kernel."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
