"""A GPU's kernels on CPU tensors, where there is no GPU: who runs them, and how a call gets there.

The package holds no emulator. A source checkout does, in its tests: a simulator of CUDA's kernels
(``tests/simt``) and an interpreter of Triton's (``tests/triton_kernels``). Its file
``tests/emulation.py`` is the one that is known here. It has three names:

- ``MEANS``: by backend, what runs its kernels, in a word;
- ``missing(backend)``: why that cannot be done on this machine, or None;
- ``operators(backend)``: a context manager that yields the backend's operators for CPU tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._version import __version__
from ..backends.availability import emulating
from ..ops.registry import OPERATORS

#: Where the emulators are, from the root of a source checkout.
FILE = Path("tests") / "emulation.py"

#: The root of the checkout that this package is used from, if it is.
OWN_ROOT = Path(__file__).resolve().parents[2]


class EmulationMissing(RuntimeError):  # noqa: N818  (as BackendUnavailable)
    """There is no emulator of a backend; the message says in one line why, or what to do."""


def load(root: Path) -> Any:
    """The emulators of a checkout.

    Args:
        root: Of the checkout, which must be of this package's version: what runs is its sources.

    Raises:
        EmulationMissing: There is none, or it is of another version.
    """
    if not (root / FILE).is_file():
        raise EmulationMissing(
            f"there is no GPU, and no source checkout in {root} to emulate one (--checkout DIR)"
        )
    theirs = _version_of(root)
    if theirs != __version__:
        raise EmulationMissing(
            f"the checkout in {root} is version {theirs}, and the package {__version__}"
        )
    name = f"fused_resnet_emulation_{abs(hash(root))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, root / FILE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _version_of(root: Path) -> str:
    file = root / "fused_resnet" / "_version.py"
    found: dict[str, Any] = {}
    if file.is_file():
        exec(file.read_text(), found)
    return str(found.get("__version__", "unknown"))


@contextlib.contextmanager
def emulated(backend: str, operators: Any) -> Iterator[None]:
    """Calls of ``backend`` on CPU tensors go to ``operators``.

    The table of operators is the process's own: another thread that uses this backend meanwhile
    would get them too.

    Args:
        backend: ``"cuda"`` or ``"triton"``.
        operators: Has the operators as attributes. They lay weights out as well.
    """
    before = dict(OPERATORS)
    OPERATORS.update({"cuda": operators, backend: operators})
    try:
        with emulating(backend):
            yield
    finally:
        OPERATORS.update(before)
