"""Registers the operator libraries, their fake implementations and their gradients.

``torch.ops.fused_resnet`` has the kernels of the compiled extension, for the CPU and for CUDA,
``torch.ops.fused_resnet_triton`` those of :mod:`fused_resnet.backends.triton` and
``torch.ops.fused_resnet_library`` those of :mod:`fused_resnet.backends.aten`, all with the same
schemas (``csrc/schemas.h``), fakes and gradients.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.library import Library, register_fake

from .. import _C
from ..backends import aten, aten_training
from . import (
    fakes_training,  # noqa: F401  (enters its functions into FAKES)
    flops,
    training_fused,
)
from .autograd import register_formulas
from .fakes import FAKES

#: The operators of :mod:`fused_resnet.backends.triton`.
TRITON = (
    "bn_add_relu",
    "bn_add_relu_backward",
    "bn_add_relu_apply",
    "conv_bn_add_relu",
    "conv_bn_add_relu_packed",
    "conv_bn_relu_maxpool",
    "conv_bn_relu_maxpool_packed",
    "conv_conv_add_relu_packed",
    "conv_statistics",
    "pack_conv_weight",
    "residual_block",
    "unpack_conv_weight",
    *aten_training.OPERATIONS,
    *training_fused.SCHEMAS,
)


def triton_operator(name: str) -> Callable[..., Any]:
    """A Triton operator; its module is imported at the first call, as few processes need Triton.

    Args:
        name: Name of the operator, one of :data:`TRITON`.
    """

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module("fused_resnet.backends.triton"), name)(*arguments)

    return call


_triton_library = Library("fused_resnet_triton", "DEF")
_pytorch_library = Library("fused_resnet_library", "DEF")
for _schema in _C.schemas():
    _triton_library.define(_schema)
    _pytorch_library.define(_schema)
for _schema in training_fused.SCHEMAS.values():
    _triton_library.define(_schema)
for _name in TRITON:
    _triton_library.impl(_name, triton_operator(_name), "CUDA")
for _key in ("CPU", "CUDA"):
    for _name in aten.operators(_key.lower()):
        _pytorch_library.impl(_name, getattr(aten, _name), _key)
    for _name in aten_training.OPERATIONS:
        _pytorch_library.impl(_name, getattr(aten_training, _name), _key)

for _namespace in ("fused_resnet", "fused_resnet_triton", "fused_resnet_library"):
    for _name, _fake in FAKES.items():
        register_fake(f"{_namespace}::{_name}", _fake)
    register_formulas(_namespace)
    flops.register(_namespace)
for _name, _fake in training_fused.FAKES.items():
    register_fake(f"fused_resnet_triton::{_name}", _fake)
flops.register("fused_resnet_triton", training_fused.FLOPS)

#: The operators of each backend.
OPERATORS: dict[str, Any] = {
    "cpu": torch.ops.fused_resnet,
    "cuda": torch.ops.fused_resnet,
    "triton": torch.ops.fused_resnet_triton,
    "library": torch.ops.fused_resnet_library,
}


#: The primitives that CUDA C++ has no kernels for; PyTorch's own max-pool runs.
PYTORCHS_ON_CUDA = ("stem_end", "stem_end_backward")


def primitives_of(backend: str) -> Any:
    """The training primitives of a backend, each as the one overload that it has.

    Those of Triton include :mod:`.training_fused`'s, and those of CUDA C++ the ``library``
    backend's for the end of the stem (:data:`PYTORCHS_ON_CUDA`).

    Args:
        backend: ``"cpu"``, ``"cuda"``, ``"library"`` or ``"triton"``.
    """
    return _primitives(backend, OPERATORS[backend])


@functools.cache
def _primitives(backend: str, operators: Any) -> Any:
    names = [*aten_training.OPERATIONS, *(training_fused.SCHEMAS if backend == "triton" else ())]
    found = {}
    for name in names:
        other = backend == "cuda" and name in PYTORCHS_ON_CUDA
        found[name] = getattr(OPERATORS["library"] if other else operators, name).default
    return SimpleNamespace(**found)


#: Whether the extension was built with CUDA. If not, Triton's operators pack weights for CUDA, in
#: the same layout.
_PACKS_CUDA = bool(_C.build_info()["cuda"])


def packers(device: torch.device) -> Any:
    """The operators that pack weights for a device.

    Args:
        device: Device that the weights are on.
    """
    return OPERATORS["triton" if device.type == "cuda" and not _PACKS_CUDA else "cuda"]


@functools.cache
def candidates(op: str, backend: str) -> dict[str, Any]:
    """The backends that can run an operator on a device, including the device's own kernels.

    On CUDA all of them read the same packed weights.

    Args:
        op: Name of the operator.
        backend: The backend of the device's own kernels, ``"cpu"`` or ``"cuda"``.

    Returns:
        The operators of each, by the name of the backend.
    """
    names = [backend]
    if op in aten.operators(backend):
        names.append("library")
    if backend == "cuda" and op in TRITON and importlib.util.find_spec("triton") is not None:
        names.append("triton")
    return {name: OPERATORS[name] for name in names}
