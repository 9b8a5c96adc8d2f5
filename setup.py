"""Builds the extension: CPU kernels always, CUDA where it can. Metadata is in pyproject.toml.

FUSED_RESNET_CUDA=0|1|auto   auto (the default): CUDA if nvcc and a CUDA build of torch are here
TORCH_CUDA_ARCH_LIST         architectures for nvcc, as torch reads it
FUSED_RESNET_ISAS            instruction sets of the CPU kernels, as in "avx2,avx512" (default: all)
MAX_JOBS                     compilers at a time
"""

import multiprocessing
import os
import platform
import runpy
import shutil
from functools import partial
from pathlib import Path

# An nvcc on PATH may be a wrapper far from its toolkit, where torch would find no headers.
if not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ) and Path("/usr/local/cuda/bin/nvcc").exists():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"

import torch
from setuptools import setup
from setuptools.command.build_clib import build_clib
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
# A static library each, with flags of its own, which begin with those of what it extends. Which one
# runs is decided at run time, so nothing outside csrc/cpu/kernels may be compiled with such a flag.
ISAS = {"portable": "", "avx2": "-mavx2 -mfma -mf16c"}
ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
ISAS["avx512_bf16"] = ISAS["amx_emulated"] = ISAS["avx512"] + " -mavx512bf16"
ISAS["amx"] = ISAS["avx512_bf16"] + " -mamx-tile -mamx-bf16"
# Where no card is in sight to ask, and TORCH_CUDA_ARCH_LIST says nothing.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# As many as the process may use, also in a container with a quota.
PROCESSORS = runpy.run_path(str(ROOT / "fused_resnet/tuning/processor.py"))["available"]()
JOBS = int(os.environ.setdefault("MAX_JOBS", str(PROCESSORS)))


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def with_cuda() -> bool:
    wanted = os.environ.get("FUSED_RESNET_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FUSED_RESNET_CUDA: expected 0, 1 or auto, got {wanted!r}")
    missing = [] if torch.version.cuda else ["a CUDA build of torch"]
    home = Path(cpp_extension.CUDA_HOME or "nowhere")
    if not ((home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists()):
        missing.append("nvcc with its headers (set CUDA_HOME)")
    if wanted == "1" and missing:
        raise SystemExit(f"FUSED_RESNET_CUDA=1, but this is missing: {', '.join(missing)}")
    return wanted != "0" and not missing


def wanted_isas() -> list[str]:
    wanted = os.environ.get("FUSED_RESNET_ISAS", ",".join(ISAS)).split(",")
    if unknown := set(wanted) - set(ISAS):
        raise SystemExit(f"FUSED_RESNET_ISAS: expected some of {','.join(ISAS)}, got {unknown}")
    x86 = [isa for isa in ISAS if any(ISAS[name].startswith(ISAS[isa]) for name in wanted)]
    return x86 if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def kernel_libraries() -> list:
    # -Wno-...: GCC 12 warns about its own AVX-512 headers.
    flags = ["-std=c++17", "-O3", "-fPIC", "-Wall"]
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    headers = [*sources("csrc/cpu/kernels/**/*.h"), "csrc/conv_shape.h"]
    libraries = []
    for isa in wanted_isas():
        build = {"cflags": flags + ISAS[isa].split(), "obj_deps": {"": headers}}
        build["sources"] = sources(f"csrc/cpu/kernels/**/isa_{isa}.cpp")
        libraries.append((f"fused_resnet_{isa}", build))
    return libraries


def in_processes(calls: list) -> None:
    """All calls, JOBS at a time; forked, as torch sets a compiler's options for each source."""
    make = multiprocessing.get_context("fork").Process
    for first in range(0, len(calls), JOBS):
        running = [make(target=call) for call in calls[first : first + JOBS]]
        for process in running:
            process.start()
        for process in running:
            process.join()
        if any(process.exitcode for process in running):
            raise SystemExit("fused_resnet: a source does not compile: see above")


class BuildKernels(build_clib):
    def build_libraries(self, libraries: list) -> None:
        one = super().build_libraries
        for name in ("compiler_so", "compiler_so_cxx") if shutil.which("ccache") else ():
            # torch puts it before the compilers of the extension's own sources.
            self.compiler.set_executable(name, ["ccache", *getattr(self.compiler, name)])
        in_processes([partial(one, [library]) for library in libraries])


class BuildExtension(cpp_extension.BuildExtension):
    def run(self) -> None:
        self.run_command("build_clib")  # also where build_ext is called by itself
        super().run()

    def build_extension(self, ext) -> None:
        one = self.compiler.compile

        def compile(files: list[str], **options) -> list[str]:
            in_processes([partial(one, [file], **options) for file in files])
            return self.compiler.object_filenames(files, output_dir=options["output_dir"])

        if not self.use_ninja:
            self.compiler.compile = compile
        super().build_extension(ext)


def extension(cuda: bool):
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    parts = [f"HAVE_{isa.upper()}" for isa in wanted_isas()] + ["WITH_CUDA"] * cuda
    macros = [(f"FR_{part}", "1") for part in parts]
    files = sources("csrc/*.cpp") + sources("csrc/cpu/*.cpp") + sources("csrc/cpu/training/*.cpp")
    files += sources("csrc/cuda/host/*.cpp") + sources("csrc/cuda/*.cu") if cuda else []
    # Without -fopenmp at::parallel_for is serial. The linker does not get it: the runtime is the
    # one that torch brought, never a second one with threads of its own.
    flags = {"cxx": ["-O2", "-Wall", "-fopenmp"]} | ({"nvcc": ["-O3"]} if cuda else {})
    options = {"define_macros": macros, "extra_compile_args": flags}
    return make("fused_resnet._C", files, depends=sources("csrc/**/*.*h"), **options)


CUDA = with_cuda()
if CUDA and not torch.cuda.is_available():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
cuda = f"{torch.version.cuda} ({cpp_extension.CUDA_HOME})" if CUDA else "off"
print(f"fused_resnet: torch {torch.__version__}, CUDA {cuda}", flush=True)
commands = {"build_clib": BuildKernels, "build_ext": BuildExtension}
setup(libraries=kernel_libraries(), ext_modules=[extension(CUDA)], cmdclass=commands)
