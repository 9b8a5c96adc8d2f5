"""Fused residual blocks for PyTorch: convolution, batch norm, residual add and ReLU in one pass.

>>> import fused_resnet as fr
>>> model = fr.fuse(torchvision_model)   # trainable; same parameters, same state_dict
>>> fast = fr.freeze(model)              # inference only; batch norm folded, weights packed
"""

from __future__ import annotations

# The extension first: an error of it is the one to see.
from . import _extension, nn, ops  # noqa: F401
from ._version import __version__
from .backends import reference
from .backends.availability import BackendUnavailable, backends, build_info, use_backend
from .fusion.fuse import fuse
from .fusion.report import Report, report
from .inference.archive import load_frozen, save_frozen
from .inference.freeze import freeze
from .inference.pack_exported import pack_exported
from .models.cifar import CifarResNet, cifar_resnet
from .models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "BackendUnavailable",
    "CifarResNet",
    "Report",
    "ResNet",
    "__version__",
    "backends",
    "build_info",
    "cifar_resnet",
    "freeze",
    "fuse",
    "load_frozen",
    "nn",
    "ops",
    "pack_exported",
    "reference",
    "report",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "save_frozen",
    "use_backend",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
