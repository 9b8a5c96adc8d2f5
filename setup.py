"""Builds the extension: CPU kernels always, CUDA where it can. Metadata is in pyproject.toml.

FUSED_RESNET_CUDA=0|1|auto   auto (the default): CUDA if nvcc and a CUDA build of torch are here
TORCH_CUDA_ARCH_LIST         architectures for nvcc, as torch reads it
MAX_JOBS                     compilers at a time
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# An nvcc on PATH may be a wrapper far from its toolkit, where torch would find no headers.
if not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ) and Path("/usr/local/cuda/bin/nvcc").exists():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"

import torch
from setuptools import setup
from setuptools.command.build_clib import build_clib
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
# One static library for each instruction set, as each has flags of its own. Which of them runs is
# decided at run time, so nothing outside csrc/cpu/kernels may be compiled with such a flag.
X86_FLAGS = {
    "avx2": ["avx2", "fma", "f16c"],
    "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"],
}
# Where no card is in sight to ask, and TORCH_CUDA_ARCH_LIST says nothing.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def with_cuda() -> bool:
    wanted = os.environ.get("FUSED_RESNET_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FUSED_RESNET_CUDA: expected 0, 1 or auto, got {wanted!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append("a CUDA build of torch")
    toolkit = ("bin/nvcc", "include/cuda_runtime.h")
    home = cpp_extension.CUDA_HOME
    if home is None or not all(Path(home, name).exists() for name in toolkit):
        missing.append("nvcc with its headers (set CUDA_HOME)")
    if wanted == "1" and missing:
        raise SystemExit(f"FUSED_RESNET_CUDA=1, but this is missing: {', '.join(missing)}")
    return wanted != "0" and not missing


def kernel_libraries() -> list:
    flags = {"portable": [], **(X86_FLAGS if IS_X86 else {})}
    # -Wno-maybe-uninitialized: GCC 12 warns about its own AVX-512 headers.
    common = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wno-maybe-uninitialized"]
    headers = [*sources("csrc/cpu/kernels/*.h"), "csrc/conv_shape.h"]
    libraries = []
    for isa, extra in flags.items():
        source = f"csrc/cpu/kernels/isa_{isa}.cpp"
        build = {
            "sources": [source],
            "cflags": common + [f"-m{name}" for name in extra],
            "obj_deps": {source: headers},
        }
        libraries.append((f"fused_resnet_{isa}", build))
    return libraries


class BuildKernels(build_clib):
    """Compiles the instruction sets' libraries side by side."""

    def build_libraries(self, libraries: list) -> None:
        one = super().build_libraries
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda library: one([library]), libraries))


class BuildExtension(cpp_extension.BuildExtension):
    """Builds the kernels first, also where it is called by itself."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()


def extension(cuda: bool):
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    macros = [("FR_HAVE_X86_KERNELS", None)] if IS_X86 else []
    macros += [("FR_WITH_CUDA", None)] if cuda else []
    files = ["csrc/bindings.cpp", *sources("csrc/cpu/*.cpp")]
    if cuda:
        files += sources("csrc/cuda/host/*.cpp") + sources("csrc/cuda/*.cu")
    # Without -fopenmp at::parallel_for is serial. The linker does not get it: the runtime is the
    # one that torch brought, never a second one with threads of its own.
    flags = {"cxx": ["-O2", "-Wall", "-fopenmp"]} | ({"nvcc": ["-O3"]} if cuda else {})
    depends = sources("csrc/**/*.h") + sources("csrc/**/*.cuh")
    return make(
        "fused_resnet._C", files, define_macros=macros, extra_compile_args=flags, depends=depends
    )


CUDA = with_cuda()
if CUDA and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
print(
    f"fused_resnet: torch {torch.__version__}, CPU kernels for "
    f"{', '.join(name.removeprefix('fused_resnet_') for name, _ in kernel_libraries())}, CUDA "
    + (f"{torch.version.cuda} ({cpp_extension.CUDA_HOME})" if CUDA else "off"),
    flush=True,
)
setup(
    libraries=kernel_libraries(),
    ext_modules=[extension(CUDA)],
    cmdclass={"build_clib": BuildKernels, "build_ext": BuildExtension},
)
