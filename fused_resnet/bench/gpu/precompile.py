"""Compiles Triton's kernels for ResNet-50's convolutions, while the extension is being built.

Needs no built extension. Each case calls one convolution by all of its configurations, which fills
Triton's cache; what they compute is checked later.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator

import torch

from . import plans
from .cases import Case, Row, Target, UnavailableError, line, note
from .operands import DTYPES, conv_operands
from .shapes import Layer, layers

BATCH = 16


def cases(target: Target, shard: int = 0, shards: int = 1) -> list[Case]:
    """One case for each convolution and precision.

    Args:
        target: Device and sizes to run on.
        shard: Index of the part of the cases to return, from 0.
        shards: Number of parts, each for a process of its own.
    """
    precisions = ("bfloat16",) if target.tiny else ("bfloat16", "float16")
    found = [
        Case(f"compile {layer.what}, {name}", functools.partial(_run, target, layer, name))
        for name in precisions
        for layer in (layers(target.tiny)[:1] if target.tiny else layers(False))
    ]
    return found[shard::shards]


def _run(target: Target, layer: Layer, precision: str) -> Iterator[Row]:
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("Triton is not installed")
    began = time.monotonic()
    with torch.no_grad(), target.operators("triton"):
        o = conv_operands(layer, 1 if target.tiny else BATCH, DTYPES[precision], target.generator())
        calls = plans.triton_calls(layer, o)
        failures = {}
        for name, call in calls.items():
            try:
                call()
                target.synchronize()
            except Exception as error:
                if target.lost():
                    raise
                failures[name] = line(error)
    seconds = time.monotonic() - began
    row = note(f"{len(calls)} configurations in {seconds:.1f} s", what=layer.what)
    if failures:
        row |= {"status": "failed", "log": [f"{n}: {why}" for n, why in failures.items()]}
        row["reason"] = f"{len(failures)} of {len(calls)} fail: {next(iter(failures.values()))}"
    yield row
