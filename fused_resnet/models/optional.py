"""Imports optional packages; the error of a missing one says how to install it."""

from __future__ import annotations

import importlib
from typing import Any

#: Modules of the extra ``models``; all others belong to the extra ``bench``.
_MODELS = ("timm", "transformers", "segmentation_models_pytorch")


class MissingPackageError(RuntimeError):
    """An optional package is needed and missing; the message says how to install it.

    Args:
        package: Name of the package.
    """

    def __init__(self, package: str) -> None:
        extra = "models" if package in _MODELS else "bench"
        super().__init__(f"{package} is not installed; run: pip install 'fused_resnet[{extra}]'")


def library(name: str) -> Any:
    """Import an optional package.

    Args:
        name: Of the package's module.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(name) from None
