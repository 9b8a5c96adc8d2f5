"""Compile a frozen network for C++ programs, or print how to compile those.

python network.py            writes network.pt2
python network.py --flags    prints the flags for the compiler
"""

import sys
from pathlib import Path

import torch
import torchvision
from torch.utils.cpp_extension import include_paths, library_paths

import fused_resnet as fr

SIZE = 64  # 224 for ImageNet


def flags() -> str:
    """PyTorch's headers and libraries, and the operators' library, which must not be dropped."""
    library = Path(fr.__file__).with_name("libfused_resnet.so")
    paths = [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        paths += [f"-L{path}", f"-Wl,-rpath,{path}"]
    linked = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", str(library)]
    return " ".join([*paths, *linked, f"-Wl,-rpath,{library.parent}"])


def compile_network() -> None:
    torch.manual_seed(0)
    frozen = fr.freeze(torchvision.models.resnet18(num_classes=10).eval())
    images = torch.ones(2, 3, SIZE, SIZE)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(frozen, (images,), dynamic_shapes={"x": {0: batch}})
        # Weights in the layout of this processor's kernels: nothing of Python is left.
        program = fr.pack_exported(program)
        torch._inductor.aoti_compile_and_package(program, package_path="network.pt2")
        print(f"class {frozen(images)[0].argmax()}, {frozen(images)[0].max():.4f}")


if __name__ == "__main__":
    if "--flags" in sys.argv:
        print(flags())
    else:
        compile_network()
