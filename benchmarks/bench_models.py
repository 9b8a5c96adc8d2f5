"""Whole networks: runs ``fused-resnet bench``; writes results/cpu-*.json and their pictures.

python benchmarks/bench_models.py            all networks: hours on two cores
python benchmarks/bench_models.py --quick    ResNet-50 in float32 on all cores, two to three minutes
python benchmarks/bench_models.py --models resnet18,resnet50 --batch 1,16 --threads 1,2 ...

A file has one number of threads and one dtype, and is written after each network, so that an
interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from fused_resnet.bench import environment, plot, results
from fused_resnet.cli import main as fused_resnet
from fused_resnet.tuning import processor

RESULTS = Path(__file__).parent / "results"
MODELS = "resnet18,resnet34,resnet50,resnet101,resnet152,cifar_resnet56"
#: Networks that are measured in bfloat16 too.
BFLOAT16 = ("resnet50",)


def slug(device: str, threads: int) -> str:
    """A file name for a processor and a number of threads."""
    return re.sub(r"[^a-z0-9]+", "-", f"cpu-{device}-{threads}-threads".lower()).strip("-")


def cases(models: list[str], threads: list[int], dtypes: list[str]) -> list[tuple[str, int, str]]:
    """Network, threads and dtype of each run; bfloat16 for the networks of :data:`BFLOAT16`."""
    return [
        (model, count, dtype)
        for count in threads
        for dtype in dtypes
        for model in models
        if dtype == "float32" or model in BFLOAT16 or len(dtypes) == 1
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = environment.cores()
    parser.add_argument("--quick", action="store_true", help="ResNet-50, float32, all cores")
    parser.add_argument("--models", help=f"default: {MODELS}")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--dtype", help="default: float32,bfloat16")
    parser.add_argument("--threads", help=f"default: 1,{cores}" if cores > 1 else "default: 1")
    parser.add_argument("--providers", default="all")
    parser.add_argument("--rounds", default="6")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    quick = arguments.quick
    models = (arguments.models or ("resnet50" if quick else MODELS)).split(",")
    dtypes = (arguments.dtype or ("float32" if quick else "float32,bfloat16")).split(",")
    default = [cores] if quick else sorted({1, cores})
    threads = [int(t) for t in arguments.threads.split(",")] if arguments.threads else default

    arguments.out.mkdir(parents=True, exist_ok=True)
    device = processor.name()
    rows: dict[str, list[results.Row]] = {}
    code, started = 0, time.monotonic()
    planned = cases(models, threads, dtypes)
    for number, (model, count, dtype) in enumerate(planned):
        minutes = (time.monotonic() - started) / 60
        print(
            f"[{number + 1} of {len(planned)}, {minutes:.0f} min] "
            f"{model}, {count} threads, {dtype}",
            file=sys.stderr,
            flush=True,
        )
        name = slug(device, count) + (f"-{dtype}" if dtype != "float32" else "")
        part = arguments.out / f"{name}.part.json"
        options = {"batch": arguments.batch, "providers": arguments.providers}
        options |= {"dtype": dtype, "threads": count, "rounds": arguments.rounds}
        options["json"] = os.path.relpath(part)  # in the command that the rows record
        flags = [f"--{option}={value}" for option, value in options.items()]
        code = max(code, fused_resnet(["bench", model, *flags]))
        if code > 1:
            return code
        rows.setdefault(name, []).extend(results.load(part))
        part.unlink()
        results.save(arguments.out / f"{name}.json", rows[name])
    for name, measured in rows.items():
        if any(row["status"] == "ok" for row in measured):
            plot.save(arguments.out / f"{name}.png", measured)
    return code


if __name__ == "__main__":
    sys.exit(main())
