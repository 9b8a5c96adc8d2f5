"""Loads the compiled extension when it is imported, or says in one line what to do instead."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

import torch  # loads libtorch and the one OpenMP runtime before the extension does

_BUILD = "pip install --no-build-isolation"


def load() -> None:
    """Import ``fused_resnet._C``.

    Raises:
        ImportError: It is not built, or can't be loaded; the message says what to do.
    """
    folder = Path(__file__).resolve().parent
    if importlib.util.find_spec("fused_resnet._C") is None:
        raise ImportError(_not_built(folder))
    try:
        importlib.import_module("fused_resnet._C")
    except ImportError as error:
        raise ImportError(explain(str(error), torch.__version__, torch.version.cuda)) from None


def _not_built(folder: Path) -> str:
    """Why there is no extension in the package's folder.

    Args:
        folder: Folder of the package.
    """
    others = sorted(path.name for path in folder.glob("_C.*.so"))
    if others:
        return (
            f"fused_resnet: the extension in {folder} was built for another Python ({others[0]}), "
            f"and this is Python {sys.version_info[0]}.{sys.version_info[1]}; build it again: "
            f"{_BUILD} --force-reinstall fused_resnet"
        )
    installed = [
        Path(entry or ".").resolve()
        for entry in sys.path
        if any(Path(entry or ".", "fused_resnet").glob("_C.*.so"))
    ]
    if installed:
        return (
            f"fused_resnet: {folder} is a source folder whose extension is not built, and Python "
            f"finds it before the installed package in {installed[0]}; start Python in another "
            f"folder, or build it here: {_BUILD} -e {folder.parent}"
        )
    if (folder.parent / "setup.py").exists():
        return (
            f"fused_resnet: the extension is not built in the source folder {folder.parent}; "
            f"build it: {_BUILD} -e {folder.parent}"
        )
    return (
        f"fused_resnet: the installation in {folder} has no extension; install it again: "
        f"{_BUILD} --force-reinstall fused_resnet"
    )


def explain(error: str, version: str, cuda: str | None) -> str:
    """What an error of the dynamic loader means.

    Args:
        error: Text of the error.
        version: Version of the installed torch.
        cuda: The CUDA version of the installed torch; None for a build without CUDA.
    """
    error = error.splitlines()[0] if error else "unknown error"
    again = f"build it again: {_BUILD} --force-reinstall fused_resnet"
    head = "fused_resnet: the extension can't be loaded"
    if "undefined symbol" in error:
        return (
            f"{head}: it runs with torch 2.11 and newer, and this is {version} ({error}); "
            "install a newer torch"
        )
    missing = re.search(r"(lib[\w.+-]+): cannot open shared object", error)
    if missing:
        library = missing[1]
        if library.startswith("libfused_resnet"):
            return f"{head}: the installation has no {library}; {again}"
        major = re.search(r"\.so\.(\d+)", library)
        of_cuda = re.match(r"lib(cuda|cublas|cudnn|nvrtc|nvJitLink|c10_cuda|torch_cuda)", library)
        if of_cuda:
            ours = f"CUDA {cuda}" if cuda else "no CUDA"
            needs = f"CUDA {major[1]}" if major and "cudart" in library else "CUDA"
            return f"{head}: it needs {library} of {needs}, and torch {version} has {ours}; {again}"
        return f"{head}: the system has no {library}; install the package that has it"
    if re.search(r"version [`'\"]?(GLIBC|GLIBCXX|CXXABI)_", error):
        return f"{head}: it was built on a newer Linux ({error}); build it on this one: {again}"
    if re.search(r"invalid ELF|file too short|wrong ELF|not a dynamic", error):
        return f"{head}: its file is damaged or of another processor ({error}); {again}"
    return f"{head}: {error}; {again}"


load()
