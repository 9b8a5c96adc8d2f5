"""Writing a file so that a reader finds all of the old one or all of the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds after which a temporary file was left by a process that was killed.
STALE = 3600


def require_regular(path: Path) -> None:
    """Check that a file can be replaced: it doesn't exist yet, or is a regular file.

    Args:
        path: Path of the file; symbolic links are followed.

    Raises:
        OSError: It is a folder, a device, a FIFO or a socket.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "exists and is not a regular file", str(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` when the ``with`` block ends without an error.

    Until then, and after any error, ``path`` stays as it was. The data is on the disk before the
    file is replaced, so a machine that loses power has one of the two.

    Args:
        path: Path of the file, in a folder that exists. A symbolic link stays; what it points to is
            replaced.

    Yields:
        The path of the temporary file, which exists and is empty.

    Raises:
        OSError: The folder can't be written to, or ``path`` is no regular file.
    """
    target = Path(os.path.realpath(path))
    require_regular(target)
    remove_stale(target)
    part = target.with_name(f"{_stem(target)}.{secrets.token_hex(4)}.part")
    # Created by os.open, so that the file gets the permissions that the user gives to new files.
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def remove_stale(path: Path, age: float = STALE) -> None:
    """Remove the temporary files of processes that were killed while they wrote a file.

    Args:
        path: The file.
        age: Seconds for which nobody has written to them; 0 where nobody else writes the file.
    """
    target = Path(os.path.realpath(path))
    oldest = time.time() - age
    for part in target.parent.glob(f"{_escaped(_stem(target))}.????????.part"):
        with contextlib.suppress(OSError):
            if part.stat().st_mtime <= oldest:
                part.unlink()


def _stem(target: Path) -> str:
    """The file's name, cut to leave room for a suffix in the 255 bytes of a name."""
    return os.fsdecode(os.fsencode(target.name)[:240])


def _escaped(name: str) -> str:
    """A name in which ``glob`` sees no wildcards."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
