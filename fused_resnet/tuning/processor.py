"""The name of the CPU that this process runs on."""

from __future__ import annotations

import platform
from pathlib import Path


def name() -> str:
    """The processor's name, made specific where the name alone is not ("AMD EPYC")."""
    fields = _cpuinfo()
    found = fields.get("model name") or platform.processor() or platform.machine()
    if not any(c.isdigit() for c in found) and "cpu family" in fields:
        found += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return found


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in first if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
