"""Photographs and labels: what ``classify`` and ``demo`` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ..models.optional import MissingPackageError
from ..models.sources import torchvision_model
from ..models.weights import load_weights
from ._common import UsageError


def read_image(command: str, path: str) -> Any:
    """The picture as PIL has it, in RGB.

    Raises:
        UsageError: No such file, or not a picture that can be read to its end.
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("pillow") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError:
        raise UsageError(f"{command}: image {path!r} is too large to be a photograph") from None
    except OSError as error:  # UnidentifiedImageError is one, and so is a truncated file
        why = error.strerror or "not a picture that Pillow can read"
        raise UsageError(f"{command}: can't read image {path!r}: {why}") from None
    except (ValueError, SyntaxError, EOFError):  # what Pillow's decoders raise on damaged files
        raise UsageError(f"{command}: can't read image {path!r}: the file is damaged") from None


def trained_model(command: str, name: str, weights: str) -> nn.Module:
    """torchvision's network with the weights of a file or of torchvision.

    Raises:
        UsageError: The weights can't be read, or are another network's.
    """
    try:
        return torchvision_model(name, load_weights(weights, name=name))
    except MissingPackageError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{command}: --weights {weights}: {str(error).splitlines()[0]}") from None


def weights_enum(model: str, weights: str | None = None) -> Any:
    """torchvision's weights of a network: those named, or the default ones.

    They also know the size and scaling of the images and the names of the classes.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError:
        raise MissingPackageError("torchvision") from None
    known = get_model_weights(model)
    name = (weights or "").rpartition(".")[2]
    return known[name] if name in known.__members__ else known.DEFAULT


def read_labels(command: str, path: str | None, classes: int, enum: Any) -> list[str]:
    """The names of the classes: a file with one a line, else ImageNet's where the number fits.

    Raises:
        UsageError: The file can't be read or does not have one line a class.
    """
    if path is None:
        categories = list(enum.meta["categories"])
        return categories if len(categories) == classes else [f"class {i}" for i in range(classes)]
    try:
        labels = Path(path).read_text().splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{command}: labels {path!r} are not text") from None
    except OSError as error:
        raise UsageError(f"{command}: can't read labels {path!r}: {error.strerror}") from None
    if len(labels) != classes:
        raise UsageError(
            f"{command}: labels {path!r}: expected {classes} lines, one a class, got {len(labels)}"
        )
    return labels


def top_table(
    title: str, answers: dict[str, Tensor], labels: Sequence[str], count: int = 5
) -> Table:
    """The most probable classes, one pair of columns an answer.

    Args:
        title: Of the table.
        answers: Logits ``(classes,)`` by the name of who answered.
        labels: Names of the classes.
        count: How many.
    """
    table = Table(title=escape(title))
    table.add_column("", justify="right")
    columns = []
    for name, logits in answers.items():
        table.add_column(name)
        table.add_column("probability", justify="right")
        top = torch.softmax(logits.double(), 0).topk(min(count, len(labels)))
        columns.append([escape(labels[i]) for i in top.indices.tolist()])
        columns.append([f"{p:.4%}" for p in top.values.tolist()])
    for rank, cells in enumerate(zip(*columns, strict=True), 1):
        table.add_row(str(rank), *cells)
    return table


def same_top(answers: dict[str, Tensor], count: int = 5) -> bool:
    """Whether all answers name the same classes in the same order."""
    tops = [logits.topk(min(count, logits.numel())).indices.tolist() for logits in answers.values()]
    return all(top == tops[0] for top in tops)
