"""Optional packages: importing one, or the one line that says how to install it."""

from __future__ import annotations

import importlib
from typing import Any

#: Modules that the extra ``models`` installs; ``bench`` installs the others.
_MODELS = ("timm", "transformers", "segmentation_models_pytorch")


class MissingPackageError(RuntimeError):
    """An optional package is needed; the message says what to install."""

    def __init__(self, package: str) -> None:
        extra = "models" if package in _MODELS else "bench"
        super().__init__(f"{package} is not installed; run: pip install 'fused_resnet[{extra}]'")


def library(name: str) -> Any:
    """An optional package that brings networks.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(name) from None
