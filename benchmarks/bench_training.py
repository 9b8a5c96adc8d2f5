"""Training steps: runs ``fused-resnet bench --training``; writes results/training-*.json, pictures.

python benchmarks/bench_training.py            all networks: an hour on two cores
python benchmarks/bench_training.py --quick    ResNet-18 and 50 in float32, five minutes
python benchmarks/bench_training.py --models resnet18 --batch 16 --dtype bfloat16 ...

A file contains one number of threads and one dtype and is rewritten after each network, so an
interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench_models import RESULTS, slug

from fused_resnet.bench import environment, plot, results
from fused_resnet.cli import main as fused_resnet
from fused_resnet.tuning import processor

#: Network, batch and what learns of it, in each run.
CASES = (
    ("resnet18", 16, ""),
    ("resnet50", 16, ""),
    ("cifar_resnet56", 128, ""),
    ("resnet18", 4, ""),
    ("resnet50", 4, ""),
    ("resnet34", 16, ""),
    ("resnet101", 16, ""),
    ("resnet50", 16, "layer4,fc"),
)
QUICK = CASES[:2]
PROVIDERS = "channels_last,compile,fused,fused_recompute"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and 50, float32")
    parser.add_argument("--models", help="instead of the built-in list, comma-separated")
    parser.add_argument("--batch", default="16", help="with --models: batch sizes")
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16 by autocast")
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--providers", default=PROVIDERS)
    parser.add_argument("--trainable", default="", help="with --models: parts to fine-tune")
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    chosen = QUICK if arguments.quick else CASES
    cases = [(model, str(batch), parts) for model, batch, parts in chosen]
    if arguments.models:
        models = arguments.models.split(",")
        cases = [(model, arguments.batch, arguments.trainable) for model in models]
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "training-" + slug(processor.name(), arguments.threads)
    name += f"-{arguments.dtype}" if arguments.dtype != "float32" else ""
    path, part = arguments.out / f"{name}.json", arguments.out / f"{name}.part.json"
    rows = results.load(path) if path.exists() else []
    code = 0
    for model, batch, parts in cases:
        print(f"{model}, batch {batch}, {arguments.dtype} {parts}", file=sys.stderr, flush=True)
        options = {
            "batch": batch,
            "dtype": arguments.dtype,
            "threads": str(arguments.threads),
            "providers": arguments.providers,
            "rounds": arguments.rounds,
            "json": os.path.relpath(part),  # in the command that the rows record
        }
        command = ["bench", model, "--training", *(["--trainable", parts] if parts else [])]
        for option, value in options.items():
            command += [f"--{option}", value]
        code = max(code, fused_resnet(command))
        if not part.exists():
            continue
        new = results.load(part)
        part.unlink()
        measured = {(row["subject"], row["batch"]) for row in new}
        rows = [row for row in rows if (row["subject"], row["batch"]) not in measured] + new
        results.save(path, rows)
        plot.save(path.with_suffix(".png"), rows)
    return code


if __name__ == "__main__":
    sys.exit(main())
