"""Builds the operators' library and the Python module _C. Metadata is in pyproject.toml.

FUSED_RESNET_CUDA=0|1|auto|nvcc   CUDA's kernels: no, yes, where a card is in sight (default), or
                                  wherever there are nvcc and a CUDA build of torch
TORCH_CUDA_ARCH_LIST              architectures for nvcc, as in "8.0;9.0+PTX" (the card's)
FUSED_RESNET_ISAS                 instruction sets of the CPU kernels, as in "avx2,avx512" (all)
MAX_JOBS                          compilers at a time
CXX, CFLAGS, LDFLAGS              the compiler, and more flags
"""

import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from toolchain import CFLAGS, CXX, Binary, Build

# Flags of each instruction set, which begin with those of what it extends. Which one runs is
# decided at run time: nothing outside csrc/cpu/kernels may be compiled with such a flag.
ISAS = {"portable": "", "avx2": "-mavx2 -mfma -mf16c"}
ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
ISAS["avx512_bf16"] = ISAS["amx_emulated"] = ISAS["avx512"] + " -mavx512bf16"
ISAS["amx"] = ISAS["avx512_bf16"] + " -mamx-tile -mamx-bf16"
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # where no card is in sight to ask
COMMON = [*CXX, "-std=c++17", "-fPIC", "-Wall", "-DNDEBUG", "-fwrapv"]
# The stable interface of torch 2.11; a library for it runs with every later one.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def torch() -> Path:
    # Only its headers and the names of its libraries are needed; importing it takes seconds.
    found = importlib.util.find_spec("torch")
    if found is None:
        raise SystemExit("fused_resnet: torch is not installed; the build needs its headers")
    return Path(str(found.origin)).parent


def cards() -> list[str]:
    query = "nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true"
    found = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.split()
    return sorted({arch for arch in found if arch.replace(".", "").isdigit()})


def with_cuda() -> bool:
    wanted = os.environ.get("FUSED_RESNET_CUDA", "auto")
    if wanted not in ("0", "1", "auto", "nvcc"):
        raise SystemExit(f"FUSED_RESNET_CUDA: expected 0, 1, auto or nvcc, got {wanted!r}")
    version = runpy.run_path(str(torch() / "version.py"))
    missing = [] if version.get("cuda") else ["a CUDA build of torch"]
    if not ((CUDA / "bin/nvcc").exists() and (CUDA / "include/cuda_runtime.h").exists()):
        missing.append("nvcc with its headers (set CUDA_HOME)")
    if wanted == "1" and missing:
        raise SystemExit(f"FUSED_RESNET_CUDA=1, but this is missing: {', '.join(missing)}")
    return wanted != "0" and not missing and (wanted != "auto" or bool(cards()))


def wanted_isas() -> list[str]:
    wanted = os.environ.get("FUSED_RESNET_ISAS", ",".join(ISAS)).split(",")
    if unknown := set(wanted) - set(ISAS):
        raise SystemExit(f"FUSED_RESNET_ISAS: expected some of {','.join(ISAS)}, got {unknown}")
    x86 = [isa for isa in ISAS if any(ISAS[name].startswith(ISAS[isa]) for name in wanted)]
    return x86 if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def nvcc() -> list[str]:
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"):
        flags.append(f"-D__CUDA_NO_{name}__")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(cards()) or CUDA_ARCHS
    for arch in wanted.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        for code in ["sm", "compute"] if arch.endswith("+PTX") else ["sm"]:
            flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return [str(CUDA / "bin/nvcc"), *flags]


def library(cuda: bool) -> Binary:
    macros = [f"-DFR_HAVE_{isa.upper()}=1" for isa in wanted_isas()] + ["-DFR_WITH_CUDA"] * cuda
    # The linker gets no -fopenmp: the runtime is torch's, never a second one with its own threads.
    host = [*COMMON, "-O2", "-fopenmp", TORCH_TARGET, *macros, "-isystem", str(torch() / "include")]
    host += [f"-isystem{CUDA / 'include'}", "-DUSE_CUDA"] * cuda + CFLAGS
    commands = dict.fromkeys(sources("csrc/cuda/*.cu"), nvcc()) if cuda else {}
    folders = ["csrc/cpu", "csrc/cpu/training", "csrc"] + ["csrc/cuda/host"] * cuda
    for isa in sorted(wanted_isas(), key=["avx512", "avx2", "portable", *ISAS].index):
        # Beside others the portable kernels are for processors from before 2013: -O1 halves the
        # time to compile them, and makes them at most 10% slower.
        level = "-O1" if isa == "portable" and len(wanted_isas()) > 1 else "-O3"
        # -Wno-...: GCC 12 warns about its own AVX-512 headers.
        warnings = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        command = [*COMMON, level, *warnings, *CFLAGS, *ISAS[isa].split()]
        commands |= dict.fromkeys(sources(f"csrc/cpu/kernels/**/isa_{isa}.cpp"), command)
    commands |= dict.fromkeys(folders, host)
    links = [f"-L{torch() / 'lib'}", "-ltorch_cpu"]
    links += ["-ltorch_cuda", f"-L{CUDA / 'lib64'}", "-lcudart"] * cuda
    return Binary("fused_resnet.libfused_resnet", commands, links)


def module() -> Binary:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise SystemExit(
            "fused_resnet: pybind11 is not installed; the build needs its headers"
        ) from None

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [*COMMON, "-O1", "-fvisibility=hidden", *includes, *CFLAGS]
    links = ["-lfused_resnet", "-Wl,-rpath,$ORIGIN"]
    return Binary("fused_resnet._C", {"csrc/python/bindings.cpp": command}, links)


CUDA_TOO = with_cuda()
print(f"fused_resnet: CUDA {'on' if CUDA_TOO else 'off'}, {', '.join(wanted_isas())}", flush=True)
setup(ext_modules=[library(CUDA_TOO), module()], cmdclass={"build_ext": Build})
