"""The CPU that this process runs on: its name, and how much of it the process may use.

It imports nothing of the package, so that ``setup.py`` can read it too.
"""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path


def name() -> str:
    """The processor's name, made specific where the name alone is not ("AMD EPYC")."""
    fields = _cpuinfo()
    found = fields.get("model name") or platform.processor() or platform.machine()
    if not any(c.isdigit() for c in found) and "cpu family" in fields:
        found += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return found


def available() -> int:
    """Logical processors that this process may use: its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, quota())))


def threads() -> int:
    """The threads that a process starts with: :func:`available`, or fewer by OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not wanted.isdigit() or int(wanted) < 1:
        return available()
    return min(available(), int(wanted))


def quota(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """Processors' worth of time that Linux gives to this process's control groups.

    ``docker run --cpus 2`` and a limit of Kubernetes set it, and no count of processors shows it.

    Args:
        groups: Folder where the control groups' file systems are mounted.
        membership: File that lists the control groups of this process.

    Returns:
        The least quota of its group and the groups around it; infinity where there is none.

    Source:
        Linux's Documentation/admin-guide/cgroup-v2.rst (cpu.max) and
        Documentation/scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    least = math.inf
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / "cpu" if controllers else groups
        group = Path(path.lstrip("/"))
        for folder in (top / group, *(top / parent for parent in group.parents), top):
            least = min(least, _quota_of(folder))
    return least


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        # Version 2 has "max", version 1 has -1 where there is no limit.
        return float(most) / float(period) if float(most) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in first if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
