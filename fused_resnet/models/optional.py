"""Imports optional packages; the error of a missing one says how to install it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

#: Modules of the extra ``models``; if nothing is said, all others belong to the extra ``train``.
_MODELS = ("timm", "transformers", "segmentation_models_pytorch")


class MissingPackageError(RuntimeError):
    """An optional package is needed and missing; the message says how to install it.

    Args:
        package: Name of the package.
        extra: The extra of this package that installs it; None for ``models`` or ``train``.
    """

    def __init__(self, package: str, extra: str | None = None) -> None:
        extra = extra or ("models" if package in _MODELS else "train")
        super().__init__(f"{package} is not installed; run: {install_line(extra)}")


def install_line(extra: str) -> str:
    """The command that installs an extra of this package.

    Args:
        extra: Name of the extra.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "setup.py").exists():  # no registry need have what a clone was built into
        return f"pip install --no-build-isolation -e '{os.path.relpath(root)}[{extra}]'"
    return f"pip install 'fused_resnet[{extra}]'"


def library(name: str, extra: str | None = None) -> Any:
    """Import an optional package.

    Args:
        name: Name of the package's module.
        extra: The extra of this package that installs it; None for ``models`` or ``train``.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(name, extra) from None
