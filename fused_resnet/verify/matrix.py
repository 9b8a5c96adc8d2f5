"""Every operation on every backend, each cell with its measured error: the table of what there is.

A backend whose device is there runs on it. On a machine without a GPU the ``cuda`` and ``triton``
backends are emulated on CPU tensors (:mod:`.emulation`): the same sources, executed or interpreted.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backends import aten as library
from ..backends.availability import NAMES, backends, use_backend
from . import emulation
from .operations import DTYPES, comparisons
from .rows import Row, worst

#: Operation and mode of every line, in the table's order. ``frozen``: inference, weights packed.
LINES = (
    ("bn_add_relu", "inference"),
    ("bn_add_relu", "training"),
    ("bn_add_relu", "backward"),
    ("conv_bn_add_relu", "inference"),
    ("conv_bn_add_relu", "training"),
    ("conv_bn_add_relu", "backward"),
    ("conv_bn_add_relu", "frozen"),
    ("conv_bn_relu_maxpool", "inference"),
    ("conv_bn_relu_maxpool", "frozen"),
    ("residual_block", "frozen"),
)

_FROZEN = {name: f"{name}_packed" for name in ("conv_bn_add_relu", "conv_bn_relu_maxpool")}

#: The fast memory format. ``fused-resnet verify`` looks at the other one too.
MEMORY_FORMAT = "channels_last"


@dataclass(frozen=True)
class Cell:
    """One operation on one backend.

    Attributes:
        operation: Of :data:`LINES`, and so ``mode``.
        mode: See there.
        dtype: Storage type, without ``torch.``.
        backend: Of :data:`fused_resnet.backends.NAMES`.
        means: What ran the kernels: ``device``, ``simulator`` or ``interpreter``. Empty where there
            is no such kernel, by design, or nothing to run it.
        reason: Why it did not run, or how it failed, in one line.
        row: What was measured.
    """

    operation: str
    mode: str
    dtype: str
    backend: str
    means: str = ""
    reason: str = ""
    row: Row | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran within its bound, or is none by design."""
        return self.row.passed if self.row is not None else not self.reason

    def __str__(self) -> str:
        """Its error, and in brackets that over PyTorch's own; ``-`` where the design has none."""
        if self.row is None:
            failed = "failed" if self.means else "not run"
            return failed if self.reason else "-"
        ratio = "" if self.row.ratio is None else f" ({self.row.ratio:.2f})"
        return f"{self.row.error:.1e}{ratio}{'' if self.row.passed else ' FAIL'}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def has(operation: str, mode: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether the design has that operation in that mode and storage type on that backend."""
    if dtype is torch.float64 and backend not in ("reference", "cpu"):
        return False
    # Packed weights are laid out for this package's kernels.
    return backend != "library" or (operation in library.OPERATIONS and mode != "frozen")


class Means(NamedTuple):
    """What runs a backend's kernels here.

    Attributes:
        word: ``device``, ``simulator`` or ``interpreter``.
        device: Where the tensors are.
        chosen: Makes the context in which an operation goes to the backend.
    """

    word: str
    device: str
    chosen: Callable[[], AbstractContextManager[Any]]


def means_of(backend: str, checkout: Path) -> Means:
    """What runs a backend's kernels on this machine.

    Args:
        backend: Of :data:`fused_resnet.backends.NAMES`.
        checkout: The root of a source checkout, whose tests hold the emulators.

    Raises:
        EmulationMissing: There is no device and no emulator.
    """
    status = backends()[backend]
    if status:
        gpu = torch.cuda.is_available() and backend in ("cuda", "triton", "library")
        return Means("device", "cuda" if gpu else "cpu", lambda: use_backend(backend))
    if backend not in ("cuda", "triton"):
        raise emulation.EmulationMissing(status.reason)
    emulators = emulation.load(checkout)
    missing = emulators.missing(backend)
    if missing:
        raise emulation.EmulationMissing(missing)

    @contextlib.contextmanager
    def chosen() -> Iterator[None]:
        with (
            emulators.operators(backend) as operators,
            emulation.emulated(backend, operators),
        ):
            yield

    return Means(emulators.MEANS[backend], "cpu", chosen)


def verify_matrix(
    dtypes: Sequence[torch.dtype] = DTYPES,
    checkout: Path = emulation.OWN_ROOT,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Cell]:
    """All cells, line by line. Float32 is strict: tf32 is off meanwhile.

    Args:
        dtypes: Storage types.
        checkout: See :func:`means_of`.
        progress: Called with a short text before each cell.
    """
    found: dict[str, Means | str] = {}
    for backend in NAMES:
        try:
            found[backend] = means_of(backend, checkout)
        except emulation.EmulationMissing as error:
            found[backend] = str(error)
    for operation, mode in LINES:
        for dtype in dtypes:
            for backend in NAMES:
                name = str(dtype).removeprefix("torch.")
                progress(f"{operation} {mode} {name} {backend}")
                yield _cell(operation, mode, dtype, backend, found[backend])


def _cell(operation: str, mode: str, dtype: torch.dtype, backend: str, means: Means | str) -> Cell:
    where = (operation, mode, str(dtype).removeprefix("torch."), backend)
    if not has(operation, mode, dtype, backend):
        return Cell(*where)
    if isinstance(means, str):
        return Cell(*where, reason=means)
    if mode == "frozen":
        operation, mode = _FROZEN.get(operation, operation), "inference"
    try:
        with _strict_float32():
            compared = comparisons(
                operation, dtype, MEMORY_FORMAT, mode, means.chosen, means.device
            )
            row = worst(compared, operation, mode, dtype, MEMORY_FORMAT)
    except Exception as error:  # a kernel that fails is a cell that fails, and the next one runs
        return Cell(*where, means.word, f"{type(error).__name__}: {_first_line(error)}")
    return Cell(*where, means.word, row=row)


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")


@contextlib.contextmanager
def _strict_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
