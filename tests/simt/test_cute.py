"""The simulator's fragments match NVIDIA's: registers are filled and read by CuTe's layouts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import simulator
import torch
from driver import Runtime
from fragments import Map, Maps, check_multiply, load_matrices
from toolkit import cuda_includes, cutlass_include

HERE = Path(__file__).resolve().parent

if simulator.missing():
    pytest.skip(str(simulator.missing()), allow_module_level=True)
if cutlass_include() is None:
    pytest.skip("nvidia-cutlass is not installed: CuTe's headers", allow_module_level=True)
if not cuda_includes():
    pytest.skip("no CUDA toolkit, whose headers CuTe includes", allow_module_level=True)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """(instruction, operand) -> (thread, value) -> index"""
    program = tmp_path_factory.mktemp("cute") / "layouts"
    headers = [f"-I{path}" for path in (cutlass_include(), *cuda_includes())]
    command = [simulator.compiler(), "-std=c++17", "-w", *headers, str(HERE / "cute_layouts.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    found: dict[tuple[str, str], dict] = {}
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        instruction, operand, *numbers = line.split()
        thread, value, index = map(int, numbers)
        found.setdefault((instruction, operand), {})[thread, value] = index
    return found


@pytest.fixture(scope="module")
def toys() -> Runtime:
    return Runtime(simulator.build_toys("plain"))


@pytest.mark.parametrize(
    ("instruction", "dtype", "depth"),
    [
        ("float16", torch.float16, 16),
        ("bfloat16", torch.bfloat16, 16),
        ("tf32", torch.float32, 8),
    ],
)
def test_mma(toys: Runtime, layouts, instruction: str, dtype: torch.dtype, depth: int) -> None:
    def places(operand: str, rows: int) -> Map:
        return {at: (i % rows, i // rows) for at, i in layouts[instruction, operand].items()}

    # CuTe's B is n x k.
    b = {at: (k, n) for at, (n, k) in places("b", 8).items()}
    check_multiply(toys, dtype, Maps(places("a", 16), b, places("c", 16), depth), seed=1)


def test_ldmatrix(toys: Runtime, layouts) -> None:
    # Each element that a row holds is its own index; a register must then hold the index of its.
    rows, registers = (
        torch.tensor([[of[lane, e] for e in range(8)] for lane in range(32)], dtype=torch.int16)
        for of in (layouts["ldmatrix", "row"], layouts["ldmatrix", "register"])
    )
    assert sorted(rows.flatten().tolist()) == list(range(256))
    assert torch.equal(load_matrices(toys, rows, seed=1), registers)
