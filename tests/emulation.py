"""The emulators behind ``fused-resnet verify --matrix``; see ``fused_resnet/verify/emulation.py``.

Loaded by that command from a checkout, outside of pytest: so it finds its neighbours itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_resnet import _registrations
from fused_resnet._autograd import register_formulas

HERE = Path(__file__).resolve().parent
MEANS = {"cuda": "executor", "triton": "interpreter"}


def missing(backend: str) -> str | None:
    """Why the backend cannot be emulated on this machine, or None."""
    if backend == "cuda":
        return _module("simt", "executor").missing()
    for package in ("triton", "numpy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (run: pip install {package})"
    return None


@contextlib.contextmanager
def operators(backend: str) -> Iterator[Any]:
    """The backend's operators for CPU tensors, differentiable. Memory that nobody wrote is NaN.

    Raises:
        AssertionError: A kernel did what a card would not forgive.
    """
    with _executed() if backend == "cuda" else _interpreted() as found:
        yield found


def _module(folder: str, name: str) -> Any:
    if str(HERE / folder) not in sys.path:
        sys.path.insert(0, str(HERE / folder))
    return importlib.import_module(name)


_kept: list[torch.library.Library] = []  # registrations that go with their library


@functools.cache
def _executor() -> Any:
    """The executor's library: compiled when its sources have changed, loaded once."""
    simt = _module("simt", "driver").Simt(_module("simt", "executor").build(), "plain", 0)

    def bn_add_relu_apply(x, weight, bias, mean, var, residual, eps, relu):
        """As ``csrc/bindings.cpp`` has it for every device."""
        return simt.ops.bn_add_relu(x, weight, bias, mean, var, residual, False, eps, relu)[0]

    _kept.append(library := torch.library.Library("fused_resnet_simt", "IMPL"))
    library.impl("bn_add_relu_apply", bn_add_relu_apply, "CPU")
    register_formulas("fused_resnet_simt")
    return simt


@contextlib.contextmanager
def _executed() -> Iterator[Any]:
    simt = _executor()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty then fills with NaN
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
        for name in _registrations.TRITON:
            library.impl(name, _registrations.triton_operator(name), "CPU")
        with _interpreter() as interpreter:
            yield torch.ops.fused_resnet_triton
            interpreter.launches()
    finally:
        library._destroy()
