"""The tuner's timings between processes: one readable JSON file in the user's cache folder.

The file is replaced as a whole, never written in place, so a process that is killed leaves the old
one. Under a lock it is read again before it is replaced, so that timings which other processes have
added meanwhile are kept. A file that can't be read, written or locked never stops a forward: it
costs one warning, and the process goes on with the timings in its memory.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .atomic_file import replacing, require_regular

FORMAT = 1

#: Calls that are kept for one machine, and machines that are kept: the oldest go first. A network
#: has some twenty calls for each input shape.
MOST_CALLS = 2000
MOST_MACHINES = 16

#: Larger files are not written by the tuner, and are not read: the limits above allow 10 MB.
MOST_BYTES = 64 * 1024 * 1024

#: Seconds to wait for another process that writes the file.
PATIENCE = 2.0


def path() -> Path:
    """Location of the file: ``FUSED_RESNET_CACHE``, or the user's cache folder.

    Raises:
        OSError: The user has no home folder, as in a container with an unknown user.
    """
    named = os.environ.get("FUSED_RESNET_CACHE")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"there is no home folder (set FUSED_RESNET_CACHE): {error}") from None
    return folder / "fused_resnet" / "tuning.json"


def load(machine: str) -> dict[str, dict[str, float]]:
    """The timings of a machine: by the key of a call, milliseconds by candidate.

    Args:
        machine: Name that the tuner gives to this machine and these versions; timings under other
            names are not returned.
    """
    return _valid(_read().get(machine, {}))


def add(machine: str, entries: dict[str, dict[str, float]]) -> None:
    """Add timings to those of a machine.

    Args:
        machine: Name that the tuner gives to this machine and these versions.
        entries: Milliseconds by candidate, by the key of a call.
    """

    def added(machines: dict[str, Any]) -> None:
        kept = _valid(machines.pop(machine, {}))
        for key in entries:
            kept.pop(key, None)
        machines[machine] = _newest({**kept, **entries}, MOST_CALLS)

    _change(added)


def remove(machine: str, keys: Iterable[str] | None = None) -> int:
    """Remove timings of a machine.

    Args:
        machine: Name that the tuner gives to this machine and these versions.
        keys: Keys of the calls; None for all.

    Returns:
        How many were removed.
    """
    removed = 0

    def without(machines: dict[str, Any]) -> None:
        nonlocal removed
        known = _valid(machines.pop(machine, {}))
        kept = {} if keys is None else {k: v for k, v in known.items() if k not in set(keys)}
        removed = len(known) - len(kept)
        if kept:
            machines[machine] = kept

    _change(without)
    return removed


def _change(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the machines of the file, under its lock."""
    import filelock  # takes as long to import as the rest of this package's tuner

    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        require_regular(file)
        # Beside the file, whose name may have no room for another suffix.
        with filelock.FileLock(file.parent / f".{file.name}.lock", timeout=PATIENCE):
            machines = _read()
            change(machines)
            document = {"format": FORMAT, "machines": _newest(machines, MOST_MACHINES)}
            with replacing(file) as part, open(part, "w") as text:
                json.dump(document, text, indent=1)
    except filelock.Timeout:
        _warn_once("the tuner's timings are not saved: another process has locked the file")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        _warn_once(f"the tuner's timings are not saved: {error}")


def _newest(entries: dict[str, Any], most: int) -> dict[str, Any]:
    """The last entries of a dictionary; both here and in JSON they are in the order of writing."""
    return dict(list(entries.items())[-most:])


def _read() -> dict[str, Any]:
    """All machines of the file; none where it doesn't exist or is not what this version writes."""
    try:
        file = path()
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block, a device might never end
            raise OSError("it is not a regular file")
        if status.st_size > MOST_BYTES:
            raise OSError(f"it has {status.st_size} bytes")
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"the tuner's file can't be read and is ignored: {error}")
        return {}
    try:
        document = json.loads(text)
        if document["format"] == FORMAT and isinstance(document["machines"], dict):
            return document["machines"]
        reason = f"it has format {document['format']!r}"
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = "it is not what the tuner writes"
    _warn_once(f"{file} is ignored and will be rewritten: {reason}")
    return {}


def _valid(entries: Any) -> dict[str, dict[str, float]]:
    """The entries that are timings."""
    if not isinstance(entries, dict):
        return {}
    return {
        key: times
        for key, times in entries.items()
        if isinstance(times, dict) and times and all(map(_is_milliseconds, times.values()))
    }


def _is_milliseconds(value: Any) -> bool:
    # The bound, a year, excludes infinity, NaN and integers that no float holds.
    return type(value) in (int, float) and 0 < value < 1e11


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fused_resnet: {message}", stacklevel=3)
