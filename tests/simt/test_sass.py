"""device.cuh's inline PTX gives the machine code that NVIDIA's own wrappers give."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from sass import instructions
from toolkit import cuda_home, cutlass_include, tool

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ["sm_80", "sm_90"]
KERNELS = {
    "copies": "LDGSTS",
    "multiply_f16": "HMMA.16816.F32 ",
    "multiply_bf16": "HMMA.16816.F32.BF16",
    "multiply_tf32": "HMMA.1688.F32.TF32",
}
#: CuTe asks cp.async to prefetch 128 bytes into L2. The kernels do not: neighbouring threads copy
#: neighbouring bytes anyway. It is the one difference that is allowed.
PREFETCH = ".LTC128B"

if cuda_home() is None:
    pytest.skip("no CUDA toolkit (nvcc and its headers)", allow_module_level=True)
if tool("nvdisasm") is None:
    pytest.skip("no nvdisasm: it comes with Triton and with the toolkit", allow_module_level=True)
if cutlass_include() is None:
    pytest.skip("nvidia-cutlass is not installed: CuTe's headers", allow_module_level=True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Kernel -> instructions, ours and CuTe's."""
    folder = tmp_path_factory.mktemp(request.param)
    found = []
    for name, defines in (("ours", []), ("cute", ["-DFR_CUTE"])):
        cubin = folder / f"{name}.cubin"
        command = [str(cuda_home() / "bin/nvcc"), "-std=c++17", "-cubin", "-arch", request.param]
        command += [*defines, f"-I{HERE.parent.parent}/csrc/cuda", f"-I{cutlass_include()}"]
        subprocess.run([*command, "-o", cubin, HERE / "sass_pairs.cu"], check=True)
        found.append({kernel: lines for (_, kernel), lines in instructions(cubin).items()})
    return tuple(found)


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_machine_code(pair: tuple, kernel: str) -> None:
    ours, cute = (side[kernel] for side in pair)
    assert any(line.startswith(KERNELS[kernel]) for line in ours)
    if kernel == "copies":
        assert sum(PREFETCH in line for line in cute) == 3
        assert not any(PREFETCH in line for line in ours)
        assert sum("DEPBAR.LE SB0, 0x2" in line for line in ours) == 1
    else:
        assert any(line.startswith("LDSM.16.M88.4") for line in ours)
    assert ours == [line.replace(PREFETCH, "") for line in cute]
