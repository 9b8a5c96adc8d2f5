"""Photographs and labels, for ``classify`` and ``demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ..models import sources
from ..models.optional import MissingPackageError
from ..models.weights import load_weights
from ._common import UsageError, printed_notes


def read_image(command: str, path: str) -> Any:
    """A picture as a PIL image in RGB.

    Args:
        command: The subcommand, for error messages.
        path: The file.

    Raises:
        UsageError: The file does not exist, is not a picture, or is damaged.
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
    except OSError as error:  # includes UnidentifiedImageError and truncated files
        why = error.strerror or "not a picture that Pillow can read"
        raise UsageError(f"{command}: can't read image {path!r}: {why}") from None
    except (ValueError, SyntaxError, EOFError):  # Pillow's decoders on damaged files
        raise UsageError(f"{command}: can't read image {path!r}: the file is damaged") from None


def read_weights(command: str, name: str, weights: str) -> dict[str, Tensor]:
    """The weights of a file, or of torchvision by their name.

    Args:
        command: The subcommand, for error messages.
        name: The network.
        weights: A file, or torchvision's name of weights.

    Raises:
        UsageError: The weights can't be read.
    """
    try:
        with printed_notes():
            return load_weights(weights, name=name if name in sources.MODELS else None)
    except MissingPackageError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{command}: --weights {weights}: {str(error).splitlines()[0]}") from None


def network_with(
    command: str, name: str, state: dict[str, Tensor], weights_source: str
) -> nn.Module:
    """The network of its own library, with weights.

    Args:
        command: The subcommand, for error messages.
        name: The network.
        state: The network's ``state_dict``.
        weights_source: Source of the weights, for error messages.

    Raises:
        UsageError: The weights do not fit the network.
    """
    try:
        return sources.plain_model(name, state)
    except ValueError as error:
        raise UsageError(f"{command}: {weights_source}: {error}") from None


def trained_model(command: str, name: str, weights: str) -> nn.Module:
    """The network with the weights of a file or of torchvision.

    Args:
        command: The subcommand, for error messages.
        name: The network.
        weights: A file, or torchvision's name of weights.

    Raises:
        UsageError: The weights can't be read, or do not fit the network.
    """
    return network_with(command, name, read_weights(command, name, weights), f"--weights {weights}")


def weights_enum(model: str, weights: str | None = None) -> Any:
    """torchvision's enum of a network's weights, with its transforms and class names.

    Args:
        model: torchvision's name of the network.
        weights: torchvision's name of weights; the default ones for any other value.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError:
        raise MissingPackageError("torchvision") from None
    known = get_model_weights(model)
    name = (weights or "").rpartition(".")[2]
    return known[name] if name in known.__members__ else known.DEFAULT


def read_labels(command: str, path: str | None, classes: int, enum: Any = None) -> list[str]:
    """The names of the classes: one per line of a file, or ImageNet's if the number fits.

    Args:
        command: The subcommand, for error messages.
        path: The file; None for ImageNet's names.
        classes: Number of classes.
        enum: A result of :func:`weights_enum`, for ImageNet's names.

    Raises:
        UsageError: The file can't be read or does not have one line per class.
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
    """The most probable classes, in two columns per network.

    Args:
        title: Title of the table.
        answers: Logits ``(classes,)`` by the network's name.
        labels: Names of the classes.
        count: Number of classes to show.
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
    """Whether all networks have the same most probable classes in the same order.

    Args:
        answers: Logits ``(classes,)`` by the network's name.
        count: Number of classes to compare.
    """
    tops = [logits.topk(min(count, logits.numel())).indices.tolist() for logits in answers.values()]
    return all(top == tops[0] for top in tops)
