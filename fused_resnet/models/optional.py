"""Imports optional packages; the error of a missing one says how to install it."""

from __future__ import annotations

import importlib
from typing import Any

#: Modules of the extra ``models``; if nothing is said, all others belong to the extra ``bench``.
_MODELS = ("timm", "transformers", "segmentation_models_pytorch")


class MissingPackageError(RuntimeError):
    """An optional package is needed and missing; the message says how to install it.

    Args:
        package: Name of the package.
        extra: The extra of this package that installs it; None for ``models`` or ``bench``.
    """

    def __init__(self, package: str, extra: str | None = None) -> None:
        extra = extra or ("models" if package in _MODELS else "bench")
        super().__init__(f"{package} is not installed; run: pip install 'fused_resnet[{extra}]'")


def library(name: str, extra: str | None = None) -> Any:
    """Import an optional package.

    Args:
        name: Of the package's module.
        extra: The extra of this package that installs it; None for ``models`` or ``bench``.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(name, extra) from None
