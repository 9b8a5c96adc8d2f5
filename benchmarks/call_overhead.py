"""The time of a forward without its kernels: ``python benchmarks/call_overhead.py resnet50``.

An empty batch runs the modules, checks, the dispatcher, the host functions' checks and the
allocation of results, but every kernel returns at once. Its time is an upper bound of the overhead
of Python. One thread; the median of many calls, in microseconds. The network of ``fuse`` packs its
weights as well.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fused_resnet as fr


def overhead(name: str, fused: bool, forwards: int = 500) -> float:
    """Microseconds of a forward without images."""
    torch.set_num_threads(1)
    model = getattr(fr, name)().eval()
    model = fr.fuse(model) if fused else fr.freeze(model)
    x = torch.empty(0, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(forwards):
            began = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - began)
    return statistics.median(times[forwards // 10 :]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50"])
    parser.add_argument("--fused", action="store_true", help="the network of fuse, not of freeze")
    arguments = parser.parse_args()
    for name in arguments.models:
        print(f"{name}: {overhead(name, arguments.fused):.0f} microseconds")


if __name__ == "__main__":
    main()
