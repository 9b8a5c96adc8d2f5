"""Single operations at ResNet-50's shapes: writes results/ops-cpu-*.json.

python benchmarks/bench_ops.py [--batch 16] [--dtype float32] [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from bench_models import RESULTS, slug
from rich.console import Console

from fused_resnet.bench import environment, harness, operations, results
from fused_resnet.tuning import processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=tuple(operations.LIMITS))
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    console = Console()
    about = {**environment.describe(), "command": shlex.join(["python", *sys.argv])}
    rows: list[results.Row] = []
    for shape in operations.SHAPES:
        measurements = harness.compare(
            operations.entries(shape, arguments.batch, arguments.dtype),
            threads=arguments.threads,
            rounds=arguments.rounds,
            round_seconds=0.2,
            warm_up_seconds=0.3,
        )
        new = results.rows(
            measurements,
            subject=shape,
            batch=arguments.batch,
            dtype=arguments.dtype,
            size=operations.SHAPES[shape].x[-1],
            threads=arguments.threads,
            baseline="unfused",
            environment=about,
        )
        console.print(results.table(new, shape))
        rows += new
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"ops-{slug(processor.name(), arguments.threads)}-{arguments.dtype}.json"
    results.save(arguments.out / name, rows)
    for line in results.complaints(rows):
        print(line, file=sys.stderr)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
