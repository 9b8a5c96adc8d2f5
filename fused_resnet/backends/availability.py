"""The backends: which are available, why others are not, and which one runs a call.

The forced backend is the only state. It is in a :class:`contextvars.ContextVar`, so it is local to
a thread (and to an asyncio task). ``torch.compile`` of torch 2.11 cannot trace a ContextVar; the
only thread-local state that it guards on is the stack of function modes. So the forced backend is
also an entry of that stack, which is what a trace reads: a compiled model is recompiled when it is
called under another choice.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .. import _C
from .._version import __version__
from . import aten
from .constant import assume_constant_result

#: The backends, in the order in which tables show them.
NAMES = ("reference", "cpu", "cuda", "triton", "library")

_choice: contextvars.ContextVar[str] = contextvars.ContextVar(
    "fused_resnet_backend", default="auto"
)


#: The kinds of device whose tensors each backend takes when it is forced, besides ``meta``; the
#: reference takes all. The tests add ``"cpu"`` to ``cuda`` and ``triton`` while they run a GPU's
#: kernels in the simulator or the interpreter.
DEVICE_TYPES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "library": ("cpu", "cuda"),
}


class BackendUnavailable(RuntimeError):  # noqa: N818  (the name is in the public contract)
    """A backend that was forced by name cannot run; the message says why."""


class Status(NamedTuple):
    """Whether a backend can run here; true in a condition if it can.

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
    """The status of each backend, by name."""
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> Status:
    if name in ("reference", "cpu"):
        return Status(True, "")
    reason = {"cuda": _cuda_reason, "triton": _triton_reason, "library": aten.reason}[name]()
    return Status(not reason, reason)


def _cuda_reason() -> str:
    if not _C.build_info()["cuda"]:
        return "the extension was built without CUDA (set FUSED_RESNET_CUDA=1 and build it again)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    problem = _C.cuda_device_problem(torch.cuda.current_device())
    if problem:
        archs = ", ".join(_C.build_info()["cuda_archs"])
        return f"this build has code for {archs}, and the device reports: {problem}"
    return ""


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (run: pip install triton)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return ""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for the calls of this thread inside the ``with`` block.

    Args:
        name: A key of :func:`backends`, or ``"auto"``.

    Raises:
        ValueError: ``name`` is not the name of a backend.
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
    with _forced(name):
        yield


@contextlib.contextmanager
def _forced(name: str) -> Iterator[None]:
    token = _choice.set(name)
    try:
        with _Marker(name):
            yield
    finally:
        _choice.reset(token)


class _Marker(TorchFunctionMode):
    """Has no effect on calls; a trace reads the forced backend from the stack of modes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def current_backend() -> str:
    """The backend that is forced in this thread, or ``"auto"``."""
    if not torch.compiler.is_compiling():
        return _choice.get()
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, _Marker):
            return mode.name
    return "auto"


def resolve_backend(op: str, x: torch.Tensor) -> str:
    """The backend that runs ``op`` on ``x``.

    Under ``"auto"`` it is the device's own kernels, or the reference where there are none: for
    float64 on CUDA and on other kinds of devices. ``library`` has some operations only; for the
    others it means the reference, which is PyTorch's too. Meta tensors go to a compiled operator,
    which has a fake implementation.

    Args:
        op: Name of the operation, for the choice and for messages.
        x: Input of the operation, whose device and dtype count.

    Returns:
        One of :data:`NAMES`.

    Raises:
        BackendUnavailable: The forced backend does not run on that device.
        RuntimeError: The call is part of an ONNX export, or ``x`` is a ``DTensor``.
        TypeError: ``x`` is no tensor.
    """
    if type(x) is not torch.Tensor:
        _check_kind(op, x)
    choice, device = current_backend(), x.device.type
    if _is_exporting_to_onnx():
        raise RuntimeError(
            f"{op}: ONNX has no such operator: export the model that fuse() or freeze() was given, "
            "which computes the same from the same state_dict"
        )
    if choice == "reference":
        return choice
    if choice == "auto":
        if device in ("cpu", "meta"):
            return "cpu"
        cuda = device == "cuda" and x.dtype is not torch.float64 and _cuda_runs(x.device.index)
        return "cuda" if cuda else "reference"
    if device not in (*DEVICE_TYPES[choice], "meta"):
        raise BackendUnavailable(
            f"{op}: backend {choice!r} is forced, but the input is on {device!r}"
        )
    if choice == "library" and op not in (*aten.OPERATIONS, "training_unit"):
        return "reference"
    return choice


def _check_kind(op: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor | torch.fx.Proxy):
        raise TypeError(f"{op}: x: expected a Tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise RuntimeError(
            f"{op}: a DTensor is not supported: run the model that fuse() or freeze() was given, "
            "or give this one x.to_local()"
        )


def is_exporting() -> bool:
    """Whether ``torch.export`` traces.

    In torch 2.11 ``torch.compiler.is_exporting()`` is true in every trace of the compiler.
    """
    return torch.compiler._is_exporting_flag


@assume_constant_result
def _is_exporting_to_onnx() -> bool:
    # A function of its own: the compiler takes torch.onnx.is_in_onnx_export() for False, also where
    # the exporter runs it. PyTorch imports torch.onnx with the first export and not before.
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


@assume_constant_result
def _cuda_runs(device: int) -> bool:
    """Whether this build has CUDA kernels for a device; constant in a process."""
    return not _cuda_problem(device)


@functools.cache
def _cuda_problem(device: int) -> str:
    return _C.cuda_device_problem(device)


def build_info() -> dict[str, Any]:
    """How the extension was built, and what it uses on this machine.

    Returns:
        A dictionary with these entries.
        ``version``: of the package. ``torch``: the version that it was compiled against.
        ``compiler``: of the host code. ``cuda``: version of the toolkit, or None. ``cuda_archs``:
        the GPU architectures that it has code for. ``isa``: the instruction set in use.
        ``isa_supported``: those of this machine, best first, and last ``amx_emulated`` for tests.
        ``isa_forced``: the value of ``FUSED_RESNET_ISA``, or None. ``bfloat16``: the dtype in which
        the CPU's convolutions multiply bfloat16 maps, ``"bfloat16"`` or ``"float32"``.
        ``threads``: of ATen's pool.
    """
    info: dict[str, Any] = {"version": __version__, **_C.build_info()}
    info["isa_forced"] = os.environ.get("FUSED_RESNET_ISA") or None
    packed = _C.packed_conv_weight_dtype(torch.bfloat16)
    info["bfloat16"] = str(packed).removeprefix("torch.")
    info["threads"] = torch.get_num_threads()
    return info
