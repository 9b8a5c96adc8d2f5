"""Counts the instructions of Triton's convolution, before a change and after it.

``python benchmarks/triton_instructions.py --before REVISION`` compiles the kernel of a revision and
that of this checkout, for the same tiles and layers, and writes
benchmarks/results/triton-instructions.json. No card is needed, and nothing in the file is a time on
one: it has what Triton and ptxas made, for each instance its registers, stack and shared memory,
and its instructions in all and in one turn of the main loop, which is the shortest loop that has a
tensor-core instruction. ``reciprocals`` are those of a turn that belong to divisions by arguments.
With ``--stem`` it is ResNet's stem at batch 256, into triton-instructions-stem.json, with the whole
kernel's loads from memory and asynchronous copies by their width.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "triton-instructions.json"
PRODUCTS = ("UTCHMMA", "HGMMA", "HMMA")
ARCHITECTURES = (80, 90, 100)
#: Layers of the static check with a residual, in bfloat16 at batch 256; sizes and stages of tiles.
CASES = (
    ("1x1", (128, 128, 64, 3)),
    ("1x1", (128, 64, 64, 4)),
    ("3x3", (128, 128, 64, 3)),
    ("3x3", (128, 64, 64, 4)),
    ("7x7", (128, 64, 32, 4)),
)


def loop_of(lines: list[str], is_code: Any, opcode: Any) -> dict[str, int]:
    """Instructions in all, with the padding behind the end, and in one turn of the main loop."""
    labels = {line[:-1]: at for at, line in enumerate(lines) if not is_code(line)}
    kinds = [opcode(line).split(".")[0] if is_code(line) else "" for line in lines]
    product = next(p for p in PRODUCTS if p in kinds)
    loops = []
    for at, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L\S+)\)", line)
        turn = [
            kind for kind in kinds[labels.get(target[1], at) if target else at : at + 1] if kind
        ]
        if product in turn[:-1]:
            loops.append(turn)
    turn = min(loops, key=len)
    counts = {"instructions": sum(map(is_code, lines)), "loop": len(turn)}
    return counts | {"products": turn.count(product), "reciprocals": turn.count("MUFU")}


def launches(
    gate: Any, ahead_of_time: Any, stem: bool
) -> Iterator[tuple[dict[str, str], Any, int]]:
    """What is compiled: what it is, its launch, and the architecture."""
    from fused_resnet.backends.triton import _conv_plan
    from fused_resnet.backends.triton.conv_bn_relu_maxpool import CONFIGS

    if stem:
        sizes = (256, 3, 64, 7, 2, 224)
        for precision, kind in ((gate.BFLOAT16, "half"), (gate.TF32, "tf32")):
            config = CONFIGS[kind][0]
            about = {"precision": str(precision), "tile": "x".join(map(str, config[:3]))}
            for arch in (80, 90):
                run = gate.stem(precision, config, sizes)
                yield about, ahead_of_time.recorded(run, arch)[-1], arch
        return
    for layer, sizes in CASES:
        tile = next(t for t in _conv_plan.CONFIGS["half"] if (*t[:3], t.stages) == sizes)
        about = {"layer": layer, "tile": "x".join(map(str, sizes))}
        for arch in ARCHITECTURES:
            call = gate.convolution(gate.BFLOAT16, layer, tile, n=256)
            (launch,) = ahead_of_time.recorded(call, arch)
            yield about, launch, arch


def measured(root: Path, stem: bool) -> list[dict[str, Any]]:
    """What Triton makes of the kernel in the checkout at ``root``."""
    tests = [root / "tests" / name for name in ("triton_kernels", "conformance", "simt", "")]
    sys.path[:0] = [str(root), *map(str, tests), str(ROOT / "benchmarks")]
    import ahead_of_time
    import test_triton_aot as gate
    import triton
    from cuda_instructions import functions, is_code, opcode
    from triton.backends.compiler import GPUTarget

    rows = []
    for about, launch, arch in launches(gate, ahead_of_time, stem):
        code = ahead_of_time.compiled(launch, arch)
        target = GPUTarget("cuda", arch, 32)
        kernel = triton.compile(ahead_of_time._source(launch), target, launch.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            (lines,) = functions(Path(file.name)).values()
        row: dict[str, Any] = {**about, "architecture": f"sm_{arch}"}
        row |= {"registers": code.registers, "stack": code.stack, "shared": code.shared}
        row |= loop_of(lines, is_code, opcode)
        if stem:
            row["loads"] = Counter(
                opcode(line)
                for line in lines
                if is_code(line) and opcode(line).startswith(("LDG.", "LDGSTS."))
            )
            del row["reciprocals"]
        rows.append(row)
    return rows


def of(root: Path, stem: bool) -> list[dict[str, Any]]:
    """The same by a process of its own, which imports nothing of another checkout."""
    command = [sys.executable, __file__, "--measure", str(root), *(["--stem"] if stem else [])]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="a git revision")
    parser.add_argument("--stem", action="store_true", help="the stem's kernel")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.stem)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        archive = ["git", "archive", arguments.before, "fused_resnet", "tests", "pyproject.toml"]
        tree = subprocess.run(archive, cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", scratch], input=tree, check=True)
        for library in (ROOT / "fused_resnet").glob("*.so"):
            (Path(scratch) / "fused_resnet" / library.name).symlink_to(library)
        stem = arguments.stem
        results = {"before": of(Path(scratch), stem), "after": of(ROOT, stem)}
    import triton

    command = f"python benchmarks/triton_instructions.py --before {arguments.before}"
    command += " --stem" if stem else ""
    head = json.dumps({"command": command, "triton": triton.__version__})[1:-1]
    parts = [f'"{k}": [\n  ' + ",\n  ".join(map(json.dumps, v)) + "]" for k, v in results.items()]
    out = arguments.out or RESULTS.with_stem(RESULTS.stem + ("-stem" if stem else ""))
    out.write_text("{" + ",\n".join([head, *parts]) + "}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
