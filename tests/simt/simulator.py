"""Builds the simulator: CUDA's host functions, launchers and kernels, as a library for the CPU.

``python tests/simt/simulator.py [plain|asan|race]`` prints the library's path. An object is
compiled again when its source or a project header that it includes has changed, so a second call
costs nothing, and a planted bug recompiles only what includes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("tests/simt")
CACHE = ROOT / "build" / "simt"
TORCH = Path(torch.__file__).parent
VARIANTS = ("plain", "asan", "race")
CCACHE = ["ccache"] if shutil.which("ccache") else []

# Kernels alone are instrumented. In the race build GCC calls __tsan_* at each access to memory:
# runtime/race.cpp answers these calls, libtsan is not linked.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
SANITIZERS += ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
KERNEL_FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g1", *SANITIZERS],
    "race": ["-O1", "-g1", "-fsanitize=thread"],
}
LINK_FLAGS = {"plain": [], "asan": ["-fsanitize=address,undefined"], "race": []}
COMMON = ["-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
COMMON += ["-march=x86-64-v3", "-DFR_SIMT"]
# No more debug information than line tables, and none for the host: it takes most of the time.
HOST_FLAGS = ["-O1", "-g0", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as in setup.py
HOST_SOURCES = ("csrc/errors.cpp", "csrc/tensor.cpp")


def missing() -> str | None:
    """Why the simulator cannot be built here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "the simulator's instructions are written for x86-64"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler ({compiler()})"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not all(re.search(rf"\b{name}\b", flags) for name in ("avx2", "fma", "f16c")):
        return "the simulator needs a processor with AVX2, FMA and F16C"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@dataclass(frozen=True)
class Object:
    """One translation unit: its source, from the root, and the flags that it is compiled with."""

    source: Path
    flags: tuple[str, ...]


def torch_includes() -> list[str]:
    include = TORCH / "include"
    paths = [include, include / "torch/csrc/api/include", sysconfig.get_path("include")]
    return [f"-isystem{path}" for path in paths]


def objects(variant: str, root: Path) -> list[Object]:
    """All translation units of the library."""
    include = [f"-I{HERE}/include"]
    kernels = [*COMMON, *KERNEL_FLAGS[variant], *include, "-x", "c++"]
    host = [*COMMON, *HOST_FLAGS, *include, *torch_includes()]
    cuda = root / "csrc" / "cuda"
    found = [Object(p.relative_to(root), tuple(host)) for p in sorted(cuda.glob("host/*.cpp"))]
    found += [Object(Path(name), tuple(host)) for name in (*HOST_SOURCES, HERE / "bindings.cpp")]
    for path in sorted(cuda.glob("*.cu")):
        if path.name != "probe.cu":  # calls the CUDA runtime, which is not linked
            found.append(Object(path.relative_to(root), tuple(kernels)))
    return [*found, *runtime_objects(variant)]


def runtime_objects(variant: str) -> list[Object]:
    flags = (*COMMON, "-O3", "-g0", "-fvisibility=hidden", f"-I{HERE}/include")
    names = ["machine.cpp", "instructions.cpp", "reports.cpp"]
    names += ["race.cpp"] if variant == "race" else []
    return [Object(HERE / "runtime" / name, flags) for name in names]


_INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)


def texts(root: Path, source: Path) -> dict[Path, str]:
    """The source and all project headers that it includes, directly or not."""
    found: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = (root / path).read_text()
        for name in _INCLUDE.findall(found[path]):
            for folder in (path.parent, HERE / "include"):
                header = Path(os.path.normpath(folder / name))
                if (root / header).is_file():
                    waiting.append(header)
                    break
    return found


@functools.cache
def toolchain() -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    return version.stdout.splitlines()[0] + torch.__version__


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def run(command: list[str], root: Path) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def atomically(command: list[str], flag: str, target: Path, root: Path) -> Path:
    """Runs a command that writes ``target``, so that another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        run([*command, flag, str(made)], root)
        os.replace(made, target)
    return target


def object_name(unit: Object, root: Path) -> str:
    parts = [f"{path}\n{text}" for path, text in sorted(texts(root, unit.source).items())]
    return f"{unit.source.stem}-{digest(toolchain(), *unit.flags, *parts)}.o"


def compiled(unit: Object, root: Path, cache: Path) -> Path:
    """The unit's object file, compiled if there is none of the same text and flags."""
    name = object_name(unit, root)
    for folder in (cache, CACHE):
        if (folder / name).exists():
            return folder / name
    command = [*CCACHE, compiler(), *unit.flags, "-c", str(unit.source)]
    return atomically(command, "-o", cache / name, root)


def linked(name: str, units: list[Object], variant: str, root: Path, cache: Path) -> Path:
    target = cache / library_name(name, units, variant, root)
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        if target.exists():
            return target
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            files = list(pool.map(lambda unit: compiled(unit, root, cache), units))
        command = [compiler(), *link_flags(variant), *map(str, files)]
        command += link_libraries(units)
        return atomically(command, "-o", target, root)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: pytest-xdist's workers would compile the same objects side by side."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def library_name(name: str, units: list[Object], variant: str, root: Path) -> str:
    names = [object_name(unit, root) for unit in units]
    return f"{name}-{variant}-{digest(toolchain(), *link_flags(variant), *names)}.so"


def link_flags(variant: str) -> list[str]:
    return ["-shared", *LINK_FLAGS[variant]]


def link_libraries(units: list[Object]) -> list[str]:
    if not any(unit.source == HERE / "bindings.cpp" for unit in units):
        return ["-pthread"]
    return [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-pthread"]


def build(variant: str = "plain", sources_root: Path = ROOT, cache: Path = CACHE) -> Path:
    """The simulator's library, built if it is not there.

    Objects are looked for in ``cache`` and in this checkout's own, and written to ``cache``.
    """
    return linked("simt", objects(variant, sources_root), variant, sources_root, cache)


def build_toys(variant: str, source: str = "toys.cu") -> Path:
    """The small kernels of test_simulator.py, each with a plain C function that launches it."""
    flags = (*COMMON, *KERNEL_FLAGS[variant], f"-I{HERE}/include", "-Icsrc/cuda", "-x", "c++")
    units = [Object(HERE / source, flags), *runtime_objects(variant)]
    return linked(Path(source).stem, units, variant, ROOT, CACHE)


def sanitizer_environment() -> dict[str, str]:
    """Variables of a process that loads the asan variant into an interpreter without it."""
    runtime = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
