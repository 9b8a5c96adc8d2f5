"""The operations' tests once more on the machine's other instruction sets: one is chosen once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import warm_process

import fused_resnet as fr

#: Tests of what is compiled for each instruction set: every kernel, in each storage type.
KERNELS = (
    "conformance",
    "ops/test_winograd.py",
    "ops/test_bfloat16.py",
    "test_program.py",
    "test_program_head.py",
    "test_program_pools.py",
    "training/test_passes.py",
    "training/test_convolutions.py",
)
#: And of the code around them, which is the same for all: checks, arguments, whole blocks.
AROUND = (
    "ops/test_operations.py",
    "ops/test_packed.py",
    "ops/test_inputs.py",
    "ops/test_wrong_arguments.py",
    "test_whole_blocks.py",
)


@pytest.mark.parametrize("tests", [KERNELS, pytest.param(AROUND, marks=pytest.mark.slow)],
                         ids=["kernels", "around-kernels"])  # fmt: skip
@pytest.mark.parametrize(
    "isa", ["amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"]
)
def test_operations_on(isa, tests):
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine does not support {isa}")
    if isa == fr.build_info()["isa"]:
        pytest.skip(f"{isa} is what the tests of this process run on")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--backend", "cpu"]
    if isa == "amx_emulated":
        command += ["-k", "bfloat16"]  # the rest is AVX-512's
    environment = os.environ | {"FUSED_RESNET_ISA": isa}
    result = warm_process.run([*command, *tests], cwd=Path(__file__).parent, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
