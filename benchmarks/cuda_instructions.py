"""Counts the instructions of CUDA's convolution kernels, before a change and after it.

``python benchmarks/cuda_instructions.py --before REVISION`` compiles the kernels of a revision and
those of this checkout with nvcc and writes benchmarks/results/cuda-instructions.json. No card is
needed, and nothing in the file is a time on one: it has what the compiler made, for each instance
of each kernel its registers, and its instructions ahead of the main loop, in one turn of it, and
behind it, which is the epilogue. ``--sources conv_bn_relu_maxpool`` counts one file's kernels.

The main loop is the shortest loop with at least half of the tensor-core (or, in strict float32,
FFMA) instructions of the loop with the most: the stem's is within the one over its tiles, and may
be unrolled, with a rest of its turns behind it. Ahead and behind are meant in the order of the
code: the stem's loads of an image may be on either side. A loop counts with what few of its turns
execute: the fetch of the residual (the last turns), the step into the map of a shortcut (once).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT / "tests" / "simt"), str(ROOT / "tests")]

from static_gate import _USAGE, demangled, name_of, opcode, short  # noqa: E402
from toolkit import tool  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cuda-instructions.json"
SOURCES = ("conv_bn_add_relu_float16", "conv_bn_add_relu_tf32", "conv_bn_add_relu_float32")
SOURCES += ("residual_block", "conv_bn_relu_maxpool")
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
FLAGS += [
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
_LINE = re.compile(
    r"^\.text\.(?P<function>\S+):|^(?P<label>\.L\S+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?P<code>.*?)\s*;",
    re.MULTILINE,
)


def functions(cubin: Path) -> dict[str, list[str]]:
    """The lines of each function: its instructions, and its labels, which end with a colon."""
    command = [str(tool("nvdisasm")), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for match in _LINE.finditer(text):
        if match["function"]:
            lines = found[match["function"]] = []
        else:
            lines.append(match["code"] or f"{match['label']}:")
    return found


def is_code(line: str) -> bool:
    return not line.endswith(":")


def parts(lines: list[str]) -> dict[str, int]:
    """The numbers of instructions of one function."""
    while lines and lines[-1].startswith(("NOP", "BRA", ".L")):
        lines = lines[:-1]  # the padding behind the end
    labels = {line[:-1]: at for at, line in enumerate(lines) if not is_code(line)}
    kinds = [opcode(line).split(".")[0] if is_code(line) else "" for line in lines]
    product = "HMMA" if "HMMA" in kinds else "FFMA"
    loops = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L\S+)\)", line)
        begin = labels.get(target[1], at) if target else at
        if begin < at:
            loops.append((at - begin, kinds[begin:at].count(product), begin, at + 1))
    count = sum(map(is_code, lines))
    most = max((products for _, products, _, _ in loops), default=0)
    if most == 0:
        return {"instructions": count}
    _, products, begin, end = min(loop for loop in loops if 2 * loop[1] >= most)
    ahead, loop = (sum(map(is_code, part)) for part in (lines[:begin], lines[begin:end]))
    return {
        "instructions": count,
        "ahead": ahead,
        "loop": loop,
        "products_in_loop": products,
        "behind": count - ahead - loop,
    }


def usage(cubin: Path) -> dict[str, int]:
    """The registers of each function."""
    command = [str(tool("cuobjdump")), "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, name = {}, ""
    for line in text.splitlines():
        if match := re.match(r"^\s*Function (\S+):", line):
            name = match[1]
        elif match := _USAGE.search(line):
            found[name] = int(match[1])
    return found


def measured(root: Path, sources: list[str]) -> dict[str, Any]:
    """What nvcc makes of the kernels in the checkout at ``root``."""
    rows = []
    seconds = -resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as scratch:
        made = {}
        for source in sources:
            for architecture in ARCHITECTURES:
                cubin = made[source, architecture] = Path(scratch, f"{source}.{architecture}.cubin")
                command = ["nvcc", *FLAGS, f"-arch={architecture}", "-cubin", "-o", str(cubin)]
                subprocess.run([*command, str(root / f"csrc/cuda/{source}.cu")], check=True)
        seconds += resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        for (_, architecture), cubin in made.items():
            code, registers = functions(cubin), usage(cubin)
            names = demangled(sorted(code))
            for mangled in sorted(code, key=names.__getitem__):
                row = {"kernel": short(name_of(names[mangled])), "architecture": architecture}
                rows.append({**row, "registers": registers[mangled], **parts(code[mangled])})
    return {"instances": len(rows), "compile_cpu_seconds": round(seconds, 1), "rows": rows}


def document(command: str, results: dict[str, Any]) -> str:
    """JSON with a line for each instance."""
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    head = {"command": command, "nvcc": nvcc.split("release ")[1].split(",")[0], "flags": FLAGS}
    lines = [json.dumps(head)[1:-1]]
    for name, result in results.items():
        rows = ",\n  ".join(json.dumps(row) for row in result.pop("rows"))
        lines.append(f'"{name}": {{{json.dumps(result)[1:-1]}, "rows": [\n  {rows}]}}')
    return "{" + ",\n".join(lines) + "}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="a git revision")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archive = ["git", "archive", arguments.before, "csrc"]
        tree = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", scratch], input=tree, check=True)
        roots = {"before": Path(scratch), "after": ROOT}
        results = {name: measured(root, arguments.sources) for name, root in roots.items()}
    command = f"python benchmarks/cuda_instructions.py --before {arguments.before}"
    if arguments.sources != SOURCES:
        command += f" --sources {' '.join(arguments.sources)}"
    arguments.out.write_text(document(command, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
