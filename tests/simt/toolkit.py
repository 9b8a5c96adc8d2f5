"""Where CUDA's compiler and tools and NVIDIA's CuTe lie, if they are here."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path


@functools.cache
def cuda_home() -> Path | None:
    """The toolkit with nvcc and its headers."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named.append(str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    for folder in filter(None, named):
        if Path(folder, "bin/nvcc").exists() and Path(folder, "include/cuda_fp16.h").exists():
            return Path(folder)
    return None


def cuda_includes() -> list[Path]:
    home = cuda_home()
    folders = [home / "include", home / "include/cccl"] if home else []
    return [folder for folder in folders if folder.is_dir()]


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


@functools.cache
def cutlass_include() -> Path | None:
    """CuTe's headers, of the package nvidia-cutlass: where the Makefile puts it, or installed."""
    folders = [Path(sys.prefix, "headers/cutlass_library"), package_folder("cutlass_library")]
    headers = [folder / "source/include" for folder in folders if folder]
    return next((path for path in headers if (path / "cute/tensor.hpp").exists()), None)


@functools.cache
def tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm: the toolkit's, or those that come with Triton."""
    home, triton = cuda_home(), package_folder("triton")
    places = [home / "bin" / name if home else None]
    places.append(triton / "backends/nvidia/bin" / name if triton else None)
    places.append(Path(found) if (found := shutil.which(name)) else None)
    return next((path for path in places if path and path.exists()), None)
