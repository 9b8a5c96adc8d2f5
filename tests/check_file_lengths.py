"""No source file has more than 500 lines: `make lint` runs this and prints those that do."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 500
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fused_resnet", "tests")
SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".py", ".pyi", ".sh"}


def too_long(root: Path) -> list[tuple[Path, int]]:
    """The files over the limit, with their lengths."""
    files = list(root.glob("*.py"))
    for folder in FOLDERS:
        files += (path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)
    lengths = [(path, len(path.read_text().splitlines())) for path in sorted(files)]
    return [(path.relative_to(root), lines) for path, lines in lengths if lines > LIMIT]


def main() -> int:
    found = too_long(ROOT)
    for path, lines in found:
        print(f"{path}: {lines} lines; the limit is {LIMIT}: split it by subject")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
