"""Machine code of a cubin or a library, by kernel."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolkit import tool

Kernel = tuple[str, str]  # architecture and mangled name

_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<instruction>.*?)\s*;"
    r"|^\.text\.(?P<function>\S+):"
    r"|^\s+\.target\s+(?P<target>sm_\d+)",
    re.MULTILINE,
)


def instructions(path: Path) -> dict[Kernel, list[str]]:
    """Each kernel's instructions, the padding at the end left out."""
    if path.suffix == ".cubin":
        return _disassembled(path.resolve())
    with tempfile.TemporaryDirectory() as folder:
        extract = [str(tool("cuobjdump")), "-xelf", "all", str(path.resolve())]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(_disassembled, Path(folder).glob("*.cubin")))
    return {kernel: lines for part in parts for kernel, lines in part.items()}


def _disassembled(cubin: Path) -> dict[Kernel, list[str]]:
    command = [str(tool("nvdisasm")), "-c", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[Kernel, list[str]] = {}
    target = ""
    current: list[str] = []
    for match in _LINE.finditer(done.stdout):
        if match["instruction"]:
            current.append(match["instruction"])
        elif match["target"]:
            target = match["target"]
        else:
            current = found[target, match["function"]] = []
    for lines in found.values():
        while lines and lines[-1] == "NOP":
            lines.pop()
    return found
