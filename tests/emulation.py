"""A GPU's kernels on CPU tensors: CUDA's in the simulator, Triton's in the interpreter.

Also imported outside of pytest (``python tests/verify_matrix.py``), so it finds its neighbours
itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_resnet.backends import availability
from fused_resnet.ops import registry
from fused_resnet.ops.autograd import register_formulas
from fused_resnet.verify.matrix import Runner, device_runners

HERE = Path(__file__).resolve().parent
NAMES = {"cuda": "simulator", "triton": "interpreter"}


def runners() -> dict[str, Runner | str]:
    """For ``verify_matrix``: the devices of this machine, and emulation where there is none."""
    found = device_runners()
    for backend, name in NAMES.items():
        if isinstance(found[backend], str):
            reason = missing(backend)
            found[backend] = reason or Runner(name, "cpu", partial(emulated, backend))
    return found


def missing(backend: str) -> str | None:
    """Why the backend cannot be emulated on this machine, or None."""
    if backend == "cuda":
        return _module("simt", "simulator").missing()
    for package in ("triton", "numpy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (run: pip install {package})"
    return None


@contextlib.contextmanager
def operators(backend: str) -> Iterator[Any]:
    """The backend's operators for CPU tensors, differentiable. Uninitialised memory is NaN.

    Raises:
        AssertionError: A kernel raced, or accessed memory that is not its own.
    """
    with _simulated() if backend == "cuda" else _interpreted() as found:
        yield found


@contextlib.contextmanager
def emulated(backend: str) -> Iterator[None]:
    """Force ``backend``, whose operators take CPU tensors meanwhile.

    The tables that this patches belong to the process, so no other thread may use the backend.
    """
    with operators(backend) as found, forced(backend, found):
        yield


@contextlib.contextmanager
def forced(backend: str, found: Any) -> Iterator[None]:
    """Force ``backend`` for CPU tensors, with ``found`` in the place of its operators.

    They also replace CUDA's, which pack the weights for Triton's kernels too.
    """
    operators_before = dict(registry.OPERATORS)
    types_before = availability.DEVICE_TYPES[backend]
    registry.OPERATORS.update({"cuda": found, backend: found})
    availability.DEVICE_TYPES[backend] = (*types_before, "cpu")
    try:
        with availability._forced(backend):  # use_backend refuses one without a device
            yield
    finally:
        availability.DEVICE_TYPES[backend] = types_before
        registry.OPERATORS.update(operators_before)


def _module(folder: str, name: str) -> Any:
    if str(HERE / folder) not in sys.path:
        sys.path.insert(0, str(HERE / folder))
    return importlib.import_module(name)


_kept: list[torch.library.Library] = []  # a library's registrations end with it


@functools.cache
def _simulator() -> Any:
    """The simulator's library: compiled when its sources have changed, loaded once."""
    simt = _module("simt", "driver").Simt(_module("simt", "simulator").build(), "plain", 0)
    register_formulas("fused_resnet_simt")
    return simt


@contextlib.contextmanager
def _simulated() -> Iterator[Any]:
    simt = _simulator()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # empty tensors are NaN
    try:
        yield simt.ops
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
    simt.launches()
    simt.check()


@functools.cache
def _interpreter() -> Any:
    return _module("triton_kernels", "interpreter").Interpreter()


@contextlib.contextmanager
def _interpreted() -> Iterator[Any]:
    library = torch.library.Library("fused_resnet_triton", "IMPL")
    try:
        for name in registry.TRITON:
            library.impl(name, registry.triton_operator(name), "CPU")
        with _interpreter() as interpreter:
            yield torch.ops.fused_resnet_triton
            interpreter.launches()
    finally:
        library._destroy()
