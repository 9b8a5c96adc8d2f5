"""The target of a rehearsal: CUDA's kernels in the simulator, Triton's in the interpreter.

Both are those of the tests, whose builds are used again.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.gpu.cases import Target

TESTS = Path(__file__).resolve().parents[2] / "tests"


def rehearsal_target(stub: bool) -> Target:
    """The CPU in place of a card.

    Args:
        stub: Whether the package is not built: then only Triton's kernels can run.
    """
    torch.set_num_threads(1)
    for folder in (TESTS, TESTS / "simt", TESTS / "triton_kernels"):
        sys.path.insert(0, str(folder))
    if stub:
        return Target(torch.device("cpu"), True, _interpreted, _nothing)
    return Target(torch.device("cpu"), True, _operators, _forced)


@contextlib.contextmanager
def _interpreted(backend: str) -> Iterator[Any]:
    assert backend == "triton", backend
    with importlib.import_module("interpreter").Interpreter() as interpreter:
        yield None
        interpreter.launches()


@contextlib.contextmanager
def _nothing(backend: str) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _operators(backend: str) -> Iterator[Any]:
    with importlib.import_module("emulation").operators(backend) as found:
        yield found


@contextlib.contextmanager
def _forced(backend: str) -> Iterator[None]:
    from fused_resnet import use_backend

    if backend == "auto":
        yield
        return
    emulation = importlib.import_module("emulation")
    emulated = backend in emulation.NAMES
    with emulation.emulated(backend) if emulated else use_backend(backend):
        yield
