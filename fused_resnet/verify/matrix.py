"""Every operation on every backend, each cell with its measured error.

The kernels of a backend run on its device. The tests of a source checkout can also run them on CPU
tensors where there is no GPU (``python tests/verify_matrix.py``).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ..backends import aten
from ..backends.availability import NAMES, backends, use_backend
from ..tuning.tf32 import tf32_set_to
from .operations import DTYPES, comparisons
from .rows import Row, worst

#: Operation and mode of every line of the table, in its order. ``frozen`` is inference with packed
#: weights.
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

#: The fast memory format. ``fused-resnet verify`` also measures the contiguous one.
MEMORY_FORMAT = "channels_last"


@dataclass(frozen=True)
class Cell:
    """One operation on one backend.

    Attributes:
        operation: Name of the operation.
        mode: ``inference``, ``training``, ``backward`` or ``frozen``.
        dtype: Storage type, without ``torch.``.
        backend: Name of the backend.
        runner: What ran the kernels: ``device``, ``simulator`` or ``interpreter``. Empty where
            there is no such kernel by design, or nothing to run it.
        reason: Why it did not run, or how it failed, in one line.
        row: The measured errors; None if it did not run.
    """

    operation: str
    mode: str
    dtype: str
    backend: str
    runner: str = ""
    reason: str = ""
    row: Row | None = None

    @property
    def passed(self) -> bool:
        """Whether its error is within the bound, or the design has no such kernel."""
        return self.row.passed if self.row is not None else not self.reason

    def __str__(self) -> str:
        """Its error, and in brackets over PyTorch's own; ``-`` where there is no kernel."""
        if self.row is None:
            failed = "failed" if self.runner else "not run"
            return failed if self.reason else "-"
        ratio = "" if self.row.ratio is None else f" ({self.row.ratio:.2f})"
        return f"{self.row.error:.1e}{ratio}{'' if self.row.passed else ' FAIL'}"

    def as_dict(self) -> dict[str, Any]:
        """The cell as a dictionary for JSON."""
        return {**asdict(self), "passed": self.passed}


def has(operation: str, mode: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether there is such a kernel by design.

    Args:
        operation: Name of the operation.
        mode: ``inference``, ``training``, ``backward`` or ``frozen``.
        dtype: Storage type.
        backend: Name of the backend.
    """
    if dtype is torch.float64 and backend not in ("reference", "cpu"):
        return False
    # Packed weights are laid out for this package's kernels.
    return backend != "library" or (operation in aten.OPERATIONS and mode != "frozen")


class Runner(NamedTuple):
    """What runs a backend's kernels.

    Attributes:
        name: ``device``, ``simulator`` or ``interpreter``.
        device: The device of the tensors.
        context: Makes the context in which operations run on the backend.
    """

    name: str
    device: str
    context: Callable[[], AbstractContextManager[Any]]


#: By backend, what runs its kernels, or why nothing does.
Runners = Mapping[str, Runner | str]


def device_runners() -> dict[str, Runner | str]:
    """By backend its device, or the reason why this machine has none."""
    found: dict[str, Runner | str] = {}
    gpu = torch.cuda.is_available()
    for backend, status in backends().items():
        if status:
            device = "cuda" if gpu and backend in ("cuda", "triton", "library") else "cpu"
            found[backend] = Runner("device", device, partial(use_backend, backend))
        else:
            found[backend] = f"there is no device for it: {status.reason}"
    return found


def verify_matrix(
    dtypes: Sequence[torch.dtype] = DTYPES,
    runners: Runners | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Cell]:
    """All cells, line by line. tf32 is off, so that float32 products are exact.

    Args:
        dtypes: Storage types.
        runners: What runs the kernels of each backend, or why nothing does, by the backend's name;
            None for the devices of this machine.
        progress: Called with a short text before each cell.

    Yields:
        The cells of a line, in the order of the backends' names.
    """
    if runners is None:
        runners = device_runners()
    for operation, mode in LINES:
        for dtype in dtypes:
            for backend in NAMES:
                name = str(dtype).removeprefix("torch.")
                progress(f"{operation} {mode} {name} {backend}")
                yield _cell(operation, mode, dtype, backend, runners[backend])


def _cell(
    operation: str, mode: str, dtype: torch.dtype, backend: str, runner: Runner | str
) -> Cell:
    where = (operation, mode, str(dtype).removeprefix("torch."), backend)
    if not has(operation, mode, dtype, backend):
        return Cell(*where)
    if isinstance(runner, str):
        return Cell(*where, reason=runner)
    if mode == "frozen":
        operation, mode = _FROZEN.get(operation, operation), "inference"
    try:
        with tf32_set_to(False):
            compared = comparisons(
                operation, dtype, MEMORY_FORMAT, mode, runner.context, runner.device
            )
            row = worst(compared, operation, mode, dtype, MEMORY_FORMAT)
    except Exception as error:  # a failed kernel fails its own cell, and the next one runs
        return Cell(*where, runner.name, f"{type(error).__name__}: {_first_line(error)}")
    return Cell(*where, runner.name, row=row)


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
