"""Writes the benchmark section of README.md from results/cpu-*.json, between its two markers.

python benchmarks/readme_table.py [--check]    with --check: exit code 1 if README.md would change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_resnet.bench import results

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOTHING = "No results have been recorded yet; `make bench` records them."
NAMES = {
    "eager": "PyTorch, eager",
    "channels_last": "PyTorch, eager, channels_last",
    "compile": "`torch.compile` with freezing",
    "jit": "`torch.jit.freeze`, optimised for inference",
    "fused": "**`fuse`**",
    "frozen": "**`freeze`**",
}


def section(files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    """Markdown: one table a file, providers down, network and batch across."""
    return "\n\n".join(_table(name, rows) for name, rows in files) or NOTHING


def _table(name: str, rows: Sequence[results.Row]) -> str:
    columns = list(dict.fromkeys((row["subject"], row["batch"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cells = {(r["provider"], r["subject"], r["batch"]): _cell(r) for r in rows}
    first = rows[0]
    versions = first["versions"]
    lines = [
        f"{first['device']}, {first['threads']} threads, {first['dtype']}, {first['size']}x"
        f"{first['size']}; torch {versions['torch']}, fused_resnet {versions['fused_resnet']} at "
        f"{first['commit']}. Images per second, and in brackets the ratio to channels_last in the "
        f"same run ([all numbers](benchmarks/results/{name})):",
        "",
        "| | " + " | ".join(f"{subject}, batch {batch}" for subject, batch in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for provider in providers:
        values = [cells.get((provider, *column), "") for column in columns]
        lines.append(f"| {NAMES.get(provider, provider)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _cell(row: results.Row) -> str:
    if row["status"] != "ok":
        return str(row["status"])
    ratio = "" if row["ratio"] is None else f" ({row['ratio']:.2f})"
    return f"{row['images_per_s']:.1f}{ratio}"


def replaced(text: str, new: str) -> str:
    """The text with what stands between the markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md: expected the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = replaced(old, section([(file.name, results.load(file)) for file in files]))
    if arguments.check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
