"""The compilers' caches and a window's rows as one archive, which a later window takes back."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

#: The largest archive that can come back from the machine.
LIMIT = 16 * 2**20

#: Bytes of the files before they are compressed, of which the first attempt keeps so many.
FIRST_ATTEMPT = 8 * LIMIT

#: Parts of the working folder, in the order in which they are kept.
PARTS = ("tuning.json", "triton", "inductor")

#: Files of Triton's cache that only people read: a kernel's intermediate forms. They must exist, or
#: the kernel is compiled again, but nothing reads what is in them.
_FOR_PEOPLE = (".ttir", ".ttgir", ".llir", ".ptx", ".source")

#: The file that says where the caches were: Triton's cache has absolute paths.
_ROOT = "root.txt"

Group = list[tuple[str, bytes]]


def save(work: Path, rows: Path, archive: Path, limit: int = LIMIT) -> str:
    """Write the archive; what does not fit is left out, the largest kernels first.

    Args:
        work: The folder of the caches.
        rows: The file of the rows.
        archive: The archive, which is replaced when it is complete.
        limit: Bytes that it may have.

    Returns:
        One line that says what it has.
    """
    part = archive.with_name(archive.name + ".part")
    groups = sorted(_groups(work), key=_size)
    found = len(groups)
    kept = sum(map(_size, groups)) - _drop(groups, sum(map(_size, groups)) - FIRST_ATTEMPT)
    while True:
        with tarfile.open(part, "w:xz", preset=1) as tar:
            _add(tar, _ROOT, str(work).encode())
            _add(tar, "rows.jsonl", rows.read_bytes() if rows.exists() else b"")
            for name, data in (file for group in groups for file in group):
                _add(tar, name, data)
        size = part.stat().st_size
        if size <= limit or not groups:
            break
        # At least the excess goes, and a tenth, so that few rounds are needed.
        kept -= _drop(groups, max(0.1, 1 - limit / size) * kept)
    os.replace(part, archive)
    text = f"{len(groups)} kernels and files, {size / 2**20:.1f} MiB"
    left_out = found - len(groups)
    return text + (f"; {left_out} large ones left out" if left_out else "")


def _drop(groups: list[Group], size: float) -> float:
    """Remove the last groups until so many bytes are gone; how many are."""
    gone = 0.0
    while groups and gone < size:
        gone += _size(groups.pop())
    return gone


def _size(group: Group) -> int:
    return sum(len(data) for _, data in group)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _groups(work: Path) -> Iterator[Group]:
    """Files that are of use together: those of a kernel, or one by itself."""
    for name in PARTS:
        path = work / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        groups: dict[Path, Group] = {}
        for file in found:
            try:
                data = b"" if file.suffix in _FOR_PEOPLE else file.read_bytes()
            except OSError:  # a folder, or a file that its compiler has removed
                continue
            key = file.parent if name == "triton" else file
            groups.setdefault(key, []).append((file.relative_to(work).as_posix(), data))
        yield from groups.values()


def restore(archive: Path, work: Path) -> Path | None:
    """Unpack an archive into a working folder.

    Args:
        archive: From :func:`save`.
        work: The folder; what it has is removed.

    Returns:
        The file of the first window's rows; None if the archive has none.

    Raises:
        ValueError: It is no such archive; the message says why.
        OSError: It can't be read.
    """
    data = archive.read_bytes()  # before the folder goes, in which it may be
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as tar:
            # extractall(filter="data"), which Python 3.11.3 does not know.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(work)
        before = (work / _ROOT).read_text()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive}: expected the caches of a window, got {error}") from None
    old, new = (json.dumps(path)[1:-1] for path in (before, str(work)))
    for path in work.glob("triton/*/__grp__*"):
        path.write_text(path.read_text().replace(old, new))
    rows = work / "rows.jsonl"
    return rows if rows.exists() and rows.stat().st_size else None
