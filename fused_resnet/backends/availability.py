"""Which backends there are, which one runs, and the reason why another does not.

The choice is the one piece of state here. It lives in a :class:`contextvars.ContextVar`, so it is
private to a thread (and to an asyncio task). Compilers of torch 2.11 cannot trace a ContextVar, and
guard on no other thread's state than the stack of function modes: so the choice is also an entry of
that stack, which is what a trace reads. A model compiled under one choice is compiled anew under
the other.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .. import _C
from .._version import __version__
from . import aten

#: In the order in which a table shows them.
NAMES = ("reference", "cpu", "cuda", "triton", "library")

_choice: contextvars.ContextVar[str] = contextvars.ContextVar(
    "fused_resnet_backend", default="auto"
)


#: Whether a GPU's backend takes CPU tensors: its kernels are then executed or interpreted there.
_emulated: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "fused_resnet_emulated", default=False
)


class BackendUnavailable(RuntimeError):  # noqa: N818  (the name is in the public contract)
    """A backend was asked for by name and cannot run; the message says why."""


class Status(NamedTuple):
    """Whether a backend can run here. True in a condition when it can.

    Attributes:
        available: Whether it can run.
        reason: Why it cannot; empty when it can.
    """

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "available" if self.available else self.reason


def backends() -> dict[str, Status]:
    """The backends by name, each available or with the reason why not."""
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> Status:
    if name in ("reference", "cpu"):
        return Status(True, "")
    reason = {"cuda": _why_no_cuda, "triton": _why_no_triton, "library": aten.why_not}[name]()
    return Status(not reason, reason)


def _why_no_cuda() -> str:
    if not _C.build_info()["cuda"]:
        return "the extension was built without CUDA (set FUSED_RESNET_CUDA=1 and build it again)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    problem = _C.cuda_device_problem(torch.cuda.current_device())
    if problem:
        archs = ", ".join(_C.build_info()["cuda_archs"])
        return f"this build holds code for {archs}, and the device says: {problem}"
    return ""


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (run: pip install triton)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return ""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for the calls made inside the ``with`` block, in this thread.

    Args:
        name: A key of :func:`backends`, or ``"auto"``.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailable: The backend cannot run here. There is no silent fallback.
    """
    if name != "auto":
        if name not in NAMES:
            raise ValueError(
                f"use_backend: name: expected 'auto' or one of {', '.join(NAMES)}, got {name!r}"
            )
        status = _status(name)
        if not status:
            raise BackendUnavailable(f"backend {name!r} is not available: {status.reason}")
    with _chosen(name):
        yield


@contextlib.contextmanager
def emulating(name: str) -> Iterator[None]:
    """Choose ``"cuda"`` or ``"triton"`` for CPU tensors, in this thread.

    For a proof on a machine without a GPU: who asks for it has put operators that take CPU tensors
    in the place of the backend's own (see :mod:`fused_resnet.verify.emulation`).
    """
    token = _emulated.set(True)
    try:
        with _chosen(name):
            yield
    finally:
        _emulated.reset(token)


@contextlib.contextmanager
def _chosen(name: str) -> Iterator[None]:
    token = _choice.set(name)
    try:
        with _Marker(name):
            yield
    finally:
        _choice.reset(token)


class _Marker(TorchFunctionMode):
    """Changes nothing; its place on the stack tells a trace what was chosen."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def current_backend() -> str:
    """The backend that this thread asked for: a name, or ``"auto"``."""
    if not torch.compiler.is_compiling():
        return _choice.get()
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, _Marker):
            return mode.name
    return "auto"


def resolve_backend(op: str, x: torch.Tensor) -> str:
    """The backend that runs ``op`` on ``x``: a name of :data:`NAMES`.

    Left to itself the choice is the device's own kernels, and the reference where there are none:
    for float64 on a CUDA device, or on another kind of device. ``library`` has but some operations;
    the others are PyTorch's own too, and so the reference. Meta tensors take the route of a
    compiled operator, whose fake answers for them.

    Raises:
        BackendUnavailable: The forced backend does not run on that device.
    """
    choice, device = current_backend(), x.device.type
    if choice == "reference":
        return choice
    if choice == "library" and device in ("cpu", "cuda", "meta"):
        return choice if op in (*aten.OPERATIONS, "training_unit") else "reference"
    if choice == "auto":
        if device in ("cpu", "meta"):
            return "cpu"
        cuda = device == "cuda" and x.dtype is not torch.float64 and _cuda_runs(x.device.index)
        return "cuda" if cuda else "reference"
    if device not in ("cuda" if choice == "triton" else choice, "meta") and not _emulated.get():
        raise BackendUnavailable(
            f"{op}: backend {choice!r} was asked for, but the input is on {device!r}"
        )
    return choice


@torch.compiler.assume_constant_result
def _cuda_runs(device: int) -> bool:
    """Whether this build has CUDA kernels for that device, which does not change in a process."""
    return not _cuda_problem(device)


@functools.cache
def _cuda_problem(device: int) -> str:
    return _C.cuda_device_problem(device)


def build_info() -> dict[str, Any]:
    """What the extension was built with and what it chose on this machine.

    Returns:
        ``version`` of the package; ``torch`` it was compiled against; ``compiler``; ``cuda``, the
        toolkit's version or None; ``cuda_archs`` compiled; ``isa`` in use and ``isa_supported`` by
        this machine, best first and behind them ``amx_emulated``, which is for tests;
        ``bfloat16``, the dtype in which the CPU's convolutions multiply bfloat16 maps,
        ``"bfloat16"`` or ``"float32"``; ``threads`` of ATen's pool.
    """
    info: dict[str, Any] = {"version": __version__, **_C.build_info()}
    info["isa_forced"] = os.environ.get("FUSED_RESNET_ISA") or None
    packed = _C.packed_conv_weight_dtype(torch.bfloat16)
    info["bfloat16"] = str(packed).removeprefix("torch.")
    info["threads"] = torch.get_num_threads()
    return info
