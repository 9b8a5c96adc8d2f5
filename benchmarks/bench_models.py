"""Whole networks: runs ``fused-resnet bench``; writes results/cpu-*.json and a picture.

python benchmarks/bench_models.py [--models resnet18,resnet50] [--batch 1,16] [--rounds N] ...
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fused_resnet.bench import environment, plot, results
from fused_resnet.cli import main as fused_resnet

RESULTS = Path(__file__).parent / "results"


def slug(device: str, threads: int) -> str:
    """A file name for a processor and a number of threads."""
    return re.sub(r"[^a-z0-9]+", "-", f"cpu-{device}-{threads}-threads".lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet18,resnet50")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", default="224")
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--providers", default="eager,channels_last,compile,jit,fused,frozen")
    parser.add_argument("--rounds", default="10")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    name = slug(environment.device(), arguments.threads)
    if arguments.dtype != "float32":
        name += f"-{arguments.dtype}"
    rows: list[results.Row] = []
    code = 0
    part = arguments.out / f"{name}.part.json"
    for model in arguments.models.split(","):
        options = ("batch", "dtype", "size", "threads", "providers", "rounds")
        flags = [f"--{option}={getattr(arguments, option)}" for option in options]
        code = max(code, fused_resnet(["bench", model, *flags, f"--json={part}"]))
        if code > 1:
            return code
        rows += results.load(part)
    part.unlink(missing_ok=True)
    results.save(arguments.out / f"{name}.json", rows)
    plot.save(arguments.out / f"{name}.png", rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
