"""torchvision's trained weights, if they are at hand: in torch.hub's cache, or a download away."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

#: Seconds in which a server must answer, and within a download send some more.
ANSWER, STALL = 4.0, 10.0


def find(known: Any) -> tuple[Any | None, str]:
    """Weights that can be had without waiting for long.

    Args:
        known: torchvision's enum of a network's weights.

    Returns:
        The enum's entry, whose file is in the cache now, or None; and a sentence about it.
    """
    entries = [known.DEFAULT, *(entry for entry in known if entry is not known.DEFAULT)]
    for entry in entries:
        file = cached(entry)
        if file.is_file():
            return entry, f"Weights: {entry}, from {file}."
    entry = entries[0]
    host = urlsplit(entry.url).hostname
    why = _unreachable(entry.url)
    if why is None:
        try:
            with _stalls_fail():
                entry.get_state_dict(progress=True, check_hash=True)
            return entry, f"Weights: {entry}, downloaded from {host}."
        except (OSError, RuntimeError) as error:  # RuntimeError: the file is not what it should be
            why = _short(error)
    return None, f"No trained weights: none in {cached(entry).parent}, and {host}: {why}."


def cached(entry: Any) -> Path:
    """Where torch.hub keeps the file of an entry.

    Args:
        entry: Entry of torchvision's enum of weights.
    """
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(entry.url).path).name


def _unreachable(url: str) -> str | None:
    """Why a file can't be downloaded; None if the server has it."""
    answers: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=ANSWER):
                answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(_short(error))

    # A thread, since the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER + 1)
    return answers[0] if answers else "no answer"


@contextlib.contextmanager
def _stalls_fail() -> Iterator[None]:
    """torch.hub downloads without a time limit; this is one for each read."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _short(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split())[:100] or type(error).__name__
