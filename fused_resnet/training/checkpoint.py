"""The checkpoint that a run resumes from: one file, whole or not there.

It is an archive of ``torch.save`` that ``weights_only=True`` reads. The new one is written beside
the old one, flushed to the disk and renamed over it, so a run that is killed at any moment leaves
one of the two. Every process holds the same weights, so the first one writes for all; only the
generators' states differ, and are gathered.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from ..tuning.atomic_file import replacing
from .errors import TrainingError

#: The file's kind, and the version of its layout.
KIND, FORMAT = "fused_resnet.checkpoint", 1

#: What a run writes into it, and the types.
CONTENT: dict[str, Any] = {
    "settings": dict,
    "classes": list,
    "epoch": int,
    "step": int,
    "seconds": float,
    "history": list,
    "sums": list,
    "generators": list,
    "model": Mapping,
    "optimizer": dict,
    "scheduler": dict,
    "scaler": dict,
    "average": (Mapping, NoneType),
}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a checkpoint.

    Args:
        path: The file.
        content: Tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        TrainingError: The file can't be written; the old one is still there.
    """
    buffer = io.BytesIO()
    torch.save({"kind": KIND, "format": FORMAT, **content}, buffer)
    write_bytes(path, buffer.getbuffer())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace a file of the run.

    Args:
        path: The file.
        data: New content of the file.

    Raises:
        TrainingError: The file can't be written; the old one is still there.
    """
    try:
        with replacing(path) as part, open(part, "wb") as file:
            file.write(data)
    except OSError as error:
        kept = (path.parent / "last").is_file()
        hint = "; the last checkpoint is whole, and --resume goes on from it" if kept else ""
        raise TrainingError(f"can't write {str(path)!r}: {error.strerror}{hint}") from None


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Args:
        path: The file.

    Raises:
        TrainingError: There is none, or it is damaged or of another kind.
    """
    what = f"checkpoint {str(path)!r}"
    if not path.is_file():
        raise TrainingError(f"{what}: there is no such file, so there is nothing to resume")
    damaged = f"{what}: damaged, or not a checkpoint of fused-resnet train"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            whole = archive.testzip() is None
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception as error:  # the readers raise anything on a damaged file
        raise TrainingError(damaged) from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise TrainingError(damaged)
    if content.get("format") != FORMAT:
        raise TrainingError(
            f"{what}: has format {content.get('format')!r}; this version reads format {FORMAT}"
        )
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key, ...), kind):
            raise TrainingError(f"{damaged} (its {key})")
    return content
