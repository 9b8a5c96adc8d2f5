"""What the tuner remembers between processes: one readable JSON file in the user's cache folder.

The file is replaced as a whole, never written in place, so that a process that is killed leaves the
old one; and what other processes have added meanwhile is read again, under a lock, before it is
replaced. Whatever cannot be read is ignored with one warning, and rewritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1


def path() -> Path:
    """Where the file is: ``FUSED_RESNET_CACHE``, or the user's cache folder."""
    given = os.environ.get("FUSED_RESNET_CACHE")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fused_resnet" / "tuning.json"


def load(machine: str) -> dict[str, dict[str, float]]:
    """What is known of a machine: by the key of a call, milliseconds by candidate.

    Entries of other machines, and of other versions, are under other names and stay as they are.
    """
    return _valid(_read().get(machine, {}))


def add(machine: str, entries: dict[str, dict[str, float]]) -> None:
    """Add entries to those of a machine. A folder that cannot be written to costs one warning."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            machines = _read()
            machines[machine] = {**_valid(machines.get(machine, {})), **entries}
            _replace(file, {"format": FORMAT, "machines": machines})
    except OSError as error:
        _warn_once(f"the tuner's choices are not kept: {error}")


def _read() -> dict[str, Any]:
    """All machines of the file; none if it is not there or not what this version writes."""
    try:
        text = path().read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _warn_once(f"{path()} can't be read and is ignored: {error}")
        return {}
    try:
        document = json.loads(text)
        if document["format"] == FORMAT and isinstance(document["machines"], dict):
            return document["machines"]
        reason = f"it has format {document['format']!r}"
    except (ValueError, KeyError, TypeError):
        reason = "it is not what the tuner writes"
    _warn_once(f"{path()} is ignored and will be written anew: {reason}")
    return {}


def _valid(entries: Any) -> dict[str, dict[str, float]]:
    """The entries that are what they should be."""
    if not isinstance(entries, dict):
        return {}
    return {
        key: times
        for key, times in entries.items()
        if isinstance(times, dict)
        and times
        and all(isinstance(ms, (int, float)) and ms > 0 for ms in times.values())
    }


def _replace(file: Path, document: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as part:
            json.dump(document, part, indent=1, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among processes; where the system has no such locks, the last one to write wins."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fused_resnet: {message}", stacklevel=3)
