"""The extension's machine code: every kernel instance, every architecture. Prints the table."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator

import launch_record
import pytest
import simulator
import static_gate
from rich.console import Console
from static_gate import Instance, Occupancy, base_of, bounds, demangled, design_of, wrong
from toolkit import tool

import fused_resnet as fr

ARCHITECTURES = fr.build_info()["cuda_archs"]

with_cuda = pytest.mark.skipif(not ARCHITECTURES, reason="the extension is built without CUDA")
with_tool = pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None,
    reason="no cuobjdump and nvdisasm: they come with Triton and with the toolkit",
)


@pytest.fixture(scope="module")
def instances(request: pytest.FixtureRequest) -> Iterator[list[Instance]]:
    path = static_gate.extension()
    assert path is not None
    found = [i for i in static_gate.read(path) if i.base in bounds()]
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=180).print(static_gate.table(found, static_gate.runs()))


@with_cuda
@with_tool
def test_no_kernel_is_missing(instances: list[Instance]) -> None:
    assert {i.base for i in instances} == set(bounds())
    assert {i.architecture for i in instances} == {a.removesuffix("+PTX") for a in ARCHITECTURES}
    for mangled in {i.mangled for i in instances}:
        there = {i.architecture for i in instances if i.mangled == mangled}
        assert there == {i.architecture for i in instances}, mangled


@with_cuda
@with_tool
def test_every_instance_is_as_designed(instances: list[Instance]) -> None:
    launched = static_gate.runs()
    found = [
        f"{i.architecture} {i.name}: {what}"
        for i in instances
        for what in wrong(i, launched.get(i.mangled))
    ]
    assert not found, "\n".join(found)


def test_every_instance_is_executed() -> None:
    """By the small calls, which also run under compute-sanitizer and against a device."""
    if simulator.missing():
        pytest.skip(str(simulator.missing()))
    launched = launch_record.of_small_calls()
    symbols = subprocess.run(
        ["nm", "--defined-only", simulator.build()], capture_output=True, text=True, check=True
    )
    names = demangled([line.split()[-1] for line in symbols.stdout.splitlines()])
    # Without the lambdas of a kernel that the compiler has not inlined.
    kernels = {mangled: name for mangled, name in names.items() if "{lambda" not in name}
    compiled = {mangled for mangled, name in kernels.items() if base_of(name) in bounds()}
    assert len(compiled) > 20
    left = sorted(names[mangled] for mangled in compiled - set(launched))
    assert not left, "never executed:\n" + "\n".join(left)


def sample(architecture: str = "sm_80", registers: int = 128, stack: int = 0) -> Instance:
    """A good instance of the convolution, or one that is spoilt by an argument."""
    arguments = "fr::Tile<64, 64, 2, 2, 4, 4>, fr::Float16, true, false, (fr::Epilogue)1"
    kernel = f"void fr::conv_bn_add_relu_kernel<{arguments}>(fr::ConvParams)"
    opcodes = {"HMMA.16816.F32": 64, "LDSM.16.M88.4": 24, "LDGSTS.E.BYPASS.128": 12}
    return Instance(architecture, "k", kernel, registers, stack, 0, Counter(opcodes))


def test_the_gate_sees_what_is_wrong() -> None:
    run = launch_record.KernelLaunches("k", 128, 32768, 32768)
    assert wrong(sample(), run) == []
    assert wrong(sample(stack=8), run) == ["8 bytes of stack"]
    assert wrong(sample(registers=129), run) == ["registers leave room for 3 of 4 blocks"]
    spilled = sample()
    spilled.opcodes["LDL.LU"] = 3
    spilled.opcodes["STL.64"] = 2
    assert wrong(spilled, run) == ["3 LDL", "2 STL"]
    for missing in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"):
        without = sample()
        del without.opcodes[missing]
        assert wrong(without, run) == [f"no {missing.split('.')[0]}"]
    greedy = launch_record.KernelLaunches("k", 128, 50000, 50000)
    assert wrong(sample(), greedy) == ["shared memory leaves room for 3 of 4 blocks"]
    wide = launch_record.KernelLaunches("k", 256, 32768, 32768)
    assert wrong(sample(), wide) == ["launched with 256 threads, compiled for 128"]


def test_occupancy() -> None:
    """Against NVIDIA's occupancy calculator."""
    assert static_gate.occupancy(sample(), 128, 32768) == Occupancy(4, 16, 4)
    assert static_gate.occupancy(sample(registers=255), 256, 65536) == Occupancy(1, 8, 2)
    ampere = sample(architecture="sm_86", registers=40)
    assert static_gate.occupancy(ampere, 256, 0) == Occupancy(6, 6, 100)


def test_designs_are_read_from_the_sources() -> None:
    design = design_of(sample())
    assert (design.threads, design.blocks) == (128, 4)
    tile = "Tile<64, 64, 2, 2, 4, 4>, Float16, true, false, residual"
    assert sample().name == f"conv_bn_add_relu_kernel<{tile}>"
    assert len(bounds()) >= 10
