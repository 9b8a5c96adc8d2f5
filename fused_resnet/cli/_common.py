"""What the subcommands share: usage errors, argument types, consoles, progress."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..models import sources

#: Storage types by the names that the command takes.
DTYPES = ("float32", "float64", "bfloat16", "float16")


class UsageError(Exception):
    """Something the user can put right; the message is one line that says what."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def one_of(kind: str, choices: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of the choices."""
    known = tuple(choices)

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {kind} {text!r}; expected one of {', '.join(known)}"
            )
        return text

    return parse


def listed(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list without repetitions."""

    def parse(text: str) -> list[Any]:
        items = [item(part.strip()) for part in text.split(",") if part.strip()]
        if not items:
            raise argparse.ArgumentTypeError("expected a comma-separated list, got nothing")
        return list(dict.fromkeys(items))

    return parse


def network(text: str) -> str:
    """An argparse type: what :func:`fused_resnet.models.sources.parse` takes."""
    try:
        return sources.parse(text)
    except sources.UnknownNetworkError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


def console() -> Console:
    """The console of stdout, made anew so that a redirected stdout is seen.

    Without a terminal there is no width to keep to, and a table that is cut is no use to a file.
    """
    return Console(width=None if sys.stdout.isatty() else 160)


def progress() -> Progress:
    """A progress bar on stderr; silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def print_json(value: Any) -> None:
    """JSON on stdout, and nothing else."""
    print(json.dumps(value, indent=1))
