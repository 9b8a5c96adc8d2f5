"""Shared by the subcommands: usage errors, argument types, and what :mod:`._output` has."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from .._version import __version__
from ..inference.archive import FrozenFile, read_frozen
from ..models import sources
from ._output import Output, progress

__all__ = [
    "DTYPES",
    "Output",
    "Parser",
    "UsageError",
    "console",
    "listed",
    "network",
    "network_or_file",
    "one_of",
    "own_network",
    "positive",
    "print_json",
    "printed_notes",
    "progress",
    "writable",
]

#: Names of the storage types.
DTYPES = ("float32", "float64", "bfloat16", "float16")


class UsageError(Exception):
    """An error that the user can correct; the message is one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def one_of(kind: str, choices: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of the choices.

    Args:
        kind: Name of the argument for the error message.
        choices: The accepted values.
    """
    known = tuple(choices)

    def parse(text: str) -> str:
        if text not in known:
            near = difflib.get_close_matches(text, known, n=1, cutoff=0.7)
            advice = f"expected one of {', '.join(known)}"
            advice += f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; {advice}")
        return text

    return parse


def listed(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list without repetitions.

    Args:
        item: The argparse type of an element.
    """

    def parse(text: str) -> list[Any]:
        items = [item(part.strip()) for part in text.split(",") if part.strip()]
        if not items:
            raise argparse.ArgumentTypeError("expected a comma-separated list, got nothing")
        return list(dict.fromkeys(items))

    return parse


def network(text: str) -> str:
    """An argparse type: a network's name, see :func:`fused_resnet.models.sources.parse`."""
    try:
        return sources.parse(text)
    except sources.UnknownNetworkError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def own_network(text: str) -> str:
    """An argparse type: a network that this package builds itself, by any of its names."""
    name = network(text)
    if name not in sources.MODELS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of this command's: {', '.join(sources.MODELS)}"
        )
    return name


def network_or_file(text: str) -> FrozenFile:
    """An argparse type: a network's name, or a file that ``fused-resnet freeze`` wrote.

    Returns:
        The contents of the file; for a name one without weights.
    """
    if Path(text).suffix in (".safetensors", ".pt") or (os.sep in text and ":" not in text):
        try:
            return read_frozen(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return FrozenFile(network(text), 0, torch.float32, True, __version__, {})


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def writable(text: str) -> Path:
    """An argparse type: a file to write, in a folder that exists."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"can't write {text!r}: no folder {str(path.parent)!r}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    return path


def console() -> Output:
    """A console of the current stdout, which may be redirected."""
    return Output()


@contextlib.contextmanager
def printed_notes() -> Iterator[None]:
    """Print on stderr what the package says in its log, such as which prefixes it removed."""
    logger = logging.getLogger("fused_resnet")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("fused-resnet: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else."""
    print(json.dumps(value, indent=1))


def threads_of(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' * (count != 1)}"
