"""The tuner's cache: one JSON file in the user's cache folder, shared by all processes.

The file is replaced atomically, so a process that is killed leaves the old one. Entries that other
processes have added are read again, under a lock, before it is replaced. A file that cannot be read
is ignored with one warning, and rewritten.
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
    """The cache file: ``FUSED_RESNET_CACHE``, or ``tuning.json`` in the user's cache folder."""
    override = os.environ.get("FUSED_RESNET_CACHE")
    if override:
        return Path(override)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fused_resnet" / "tuning.json"


def load(machine: str) -> dict[str, dict[str, float]]:
    """The timings of a machine.

    Args:
        machine: From :func:`.tuner.machine_of`: device, versions and settings.

    Returns:
        Milliseconds of each candidate, by the key of the call.
    """
    return _valid(_read().get(machine, {}))


def add(machine: str, entries: dict[str, dict[str, float]]) -> None:
    """Add timings of a machine; warns once if the folder cannot be written to.

    Args:
        machine: From :func:`.tuner.machine_of`: device, versions and settings.
        entries: Milliseconds of each candidate, by the key of the call.
    """
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            machines = _read()
            machines[machine] = {**_valid(machines.get(machine, {})), **entries}
            _replace(file, {"format": FORMAT, "machines": machines})
    except OSError as error:
        _warn_once(f"the tuner's timings are not saved: {error}")


def _read() -> dict[str, Any]:
    """The entries of all machines; none if there is no file or it has another format."""
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
        reason = "it is not a file of the tuner"
    _warn_once(f"{path()} is ignored and will be rewritten: {reason}")
    return {}


def _valid(entries: Any) -> dict[str, dict[str, float]]:
    """The entries that have the right types."""
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
        with os.fdopen(handle, "w") as temporary:
            json.dump(document, temporary, indent=1, sort_keys=True)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock between processes; on systems without such locks, the last writer wins."""
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
