"""The simulator itself: every instruction against a truth of its own, every mistake reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulator
import torch
from driver import Runtime, Simt
from fragments import check_multiply, load_matrices, manual_maps, pointer
from toy_process import BLOCKS, run

HERE = Path(__file__).resolve().parent
SEEDS = [0, 1, 2, 3]
WRONG = re.search(r"enum class Wrong \{(.*?)\}", (HERE / "toys.cu").read_text(), re.DOTALL)
MISTAKES = [name.strip() for name in WRONG[1].split(",") if name.strip()] if WRONG else []

if simulator.missing():
    pytest.skip(str(simulator.missing()), allow_module_level=True)


@pytest.fixture(scope="module")
def toys() -> Runtime:
    return Runtime(simulator.build_toys("plain"))


@pytest.fixture(scope="module")
def race_toys() -> Runtime:
    return Runtime(simulator.build_toys("race"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mma(toys: Runtime, dtype: torch.dtype, seed: int) -> None:
    check_multiply(toys, dtype, manual_maps(dtype != torch.float32), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_ldmatrix(toys: Runtime, seed: int) -> None:
    rows = torch.arange(256, dtype=torch.int16).view(32, 8)
    loaded = load_matrices(toys, rows, seed)
    # Register i of lane t: the two elements from 2 (t mod 4) on of row t / 4 of 8 x 8 matrix i.
    matrices = rows.view(4, 8, 4, 2).flatten(1, 2)
    assert torch.equal(loaded.view(32, 4, 2), matrices.transpose(0, 1))


def test_round_to_tf32(toys: Runtime) -> None:
    value = torch.randn(1024).view(torch.int32)
    value[:8] = torch.tensor(
        [0x1000, 0x0FFF, 0x3FFFF000, 0x7F7FFFFF, 0x7F800000, 0, 0x3000, 0x1FFF]
    )
    value[8:16] = value[:8] | torch.tensor(-(2**31)).to(torch.int32)
    rounded = torch.empty_like(value)
    assert toys.library.toy_round(pointer(value), pointer(rounded), 8) == 0
    # To a multiple of 2^13 units in the last place, ties away from zero: on the integers that the
    # magnitudes are.
    magnitude = value.to(torch.int64) & 0x7FFFFFFF
    expected = torch.floor(magnitude.double() / 2**13 + 0.5).to(torch.int64) * 2**13
    assert torch.equal(rounded.to(torch.int64) & 0x7FFFFFFF, expected)
    assert torch.equal(rounded < 0, value < 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(toys: Runtime, dtype: torch.dtype) -> None:
    """Kernels convert with CUDA's functions, here by twins: bit by bit PyTorch's."""
    name = "half" if dtype == torch.float16 else "bfloat16"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    getattr(toys.library, f"toy_from_{name}")(pointer(every), pointer(wide), 2**16)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    number = every.isfinite()
    between = torch.cat(
        [
            every[number].float() * factor
            for factor in (1, 1 + 2**-9, 1 - 2**-9, 1 + 2**-12, 1 + 2**-8, 1e-3, 1e9)
        ]
        + [torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38])]
    )
    narrow = torch.empty(len(between), dtype=dtype)
    getattr(toys.library, f"toy_to_{name}")(pointer(between), pointer(narrow), len(between))
    torch.testing.assert_close(narrow, between.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("argument", "width"), [(0, 32), (7, 32), (16, 32), (3, 8), (5, 16)])
def test_shuffles(toys: Runtime, argument: int, width: int) -> None:
    values = torch.randn(32)
    out = torch.empty(3, 32)
    assert toys.library.toy_shuffles(pointer(values), pointer(out), argument, width) == 0
    segments = values.view(-1, width)
    lane = torch.arange(width)
    down = torch.where(lane + argument < width, lane + argument, lane)
    expected = [segments[:, argument % width].repeat_interleave(width)]
    expected += [segments[:, lane ^ argument].flatten() if argument < width else values]
    expected += [segments[:, down].flatten()]
    assert torch.equal(out, torch.stack(expected))
    toys.check()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
def test_async_copies(toys: Runtime, steps: int, seed: int) -> None:
    rows = torch.randn(max(steps, 1), 64)
    out = torch.empty(16)
    toys.seed(seed)
    assert toys.library.toy_pipeline(pointer(rows), pointer(out), steps) == 0
    expected = rows[:steps:2].double().sum(0).view(4, 16).sum(0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    toys.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_indices_and_launches(toys: Runtime, seed: int) -> None:
    out = torch.zeros(12, 30, dtype=torch.int32)
    toys.launches()
    toys.seed(seed)
    assert toys.library.toy_indices(pointer(out)) == 0
    expected = 1000 * torch.arange(12).view(-1, 1) + torch.arange(30)
    assert torch.equal(out.to(torch.int64), expected)  # each thread once
    (launch,) = toys.launches()
    assert launch.kernel == "fr::indices_kernel(int*)"
    assert launch.mangled == "_ZN2fr14indices_kernelEPi"
    assert (launch.grid, launch.block, launch.shared) == ((3, 2, 2), (5, 3, 2), 0)
    assert toys.launches() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_sum_of_blocks(toys: Runtime, seed: int) -> None:
    values = torch.randint(-100, 100, (40, 256)).float()
    sums = torch.full((40,), float("nan"))
    toys.seed(seed)
    assert toys.library.toy_sum(pointer(values), pointer(sums), 40) == 0
    assert torch.equal(sums, values.sum(1))
    toys.check()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ((0, 1, 32, 0), "a grid of no blocks"),
        ((1, 1, 0, 0), "a block of no threads"),
        ((1, 1, 1025, 0), "a block of more than 1024 threads"),
        ((1, 65536, 32, 0), "a grid that is too large"),
        ((1, 1, 32, 99 * 1024 + 1), "more shared memory than 99 KiB"),
    ],
)
def test_impossible_launch(toys: Runtime, sizes: tuple[int, ...], why: str) -> None:
    toys.reports()
    assert toys.library.toy_launch(*sizes, None) != 0
    (report,) = toys.reports()
    assert f"launch of fr::indices_kernel(int*) with {why}" in report


# Mistakes. What the plain build sees of one is a report, or a result that is wrong: memory that no
# one wrote and data under way are NaN.

RIGHT = MISTAKES.index("kNothing")
REPORTED_BY_PLAIN = {
    "kDivergentBarrier": r"deadlock.* thread 0 at __syncthreads \(toys.cu",
    "kReturnsBeforeBarrier": "not all threads of the block reach the barrier|different barriers",
    "kBarriersApart": "threads of a block wait at different barriers",
    "kDivergentShuffle": "lanes of a warp diverge|deadlock",
    "kCollectivesApart": "lanes of a warp diverge: .* at __shfl_.*, this one comes to __shfl",
    "kMisalignedCopy": "an address is no multiple of 16",
    "kTooMuchShared": "the kernel takes 4096 bytes of shared memory, the launch gave 512",
    "kEndsDuringCopy": "ends while its cp.async is under way",
}
WRONG_IN_PLAIN = ["kMissingBarrier", "kWaitTooFew", "kReadBeforeWait", "kUninitialisedShared"]
REPORTED_BY_RACE = {
    "kMissingBarrier": "race: read after write of shared memory|read of (data under way|uninit)",
    "kMissingWarpBarrier": "race: read after write of shared memory|race: write after read",
    "kWaitTooFew": "read of data under way of shared memory",
    "kReadBeforeWait": "read of data under way of shared memory",
    "kSharedOutOfBounds": "access out of bounds of shared memory",
    "kUninitialisedShared": "read of uninitialised bytes of shared memory",
    "kOverwritesWhileRead": "race: write after read|race: read after write",
    "kBlocksMeetInMemory": "race: write after write of global memory",
}
REPORTED_BY_ASAN = {
    "kWaitTooFew": "AddressSanitizer: use-after-poison",
    "kReadBeforeWait": "AddressSanitizer: use-after-poison",
    "kSharedOutOfBounds": "AddressSanitizer: use-after-poison",
    "kGlobalOutOfBounds": "AddressSanitizer: heap-buffer-overflow",
    "kIndexOutOfRegisters": "out of bounds|stack-buffer-overflow",
}


def test_every_mistake_is_listed() -> None:
    listed = {*REPORTED_BY_PLAIN, *WRONG_IN_PLAIN, *REPORTED_BY_RACE, *REPORTED_BY_ASAN}
    assert listed | {"kNothing"} == set(MISTAKES)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mistake(toys: Runtime, race_toys: Runtime, seed: int) -> None:
    results = []
    for runtime in (toys, race_toys):
        runtime.seed(seed)
        error, result = run(runtime.library, RIGHT)
        runtime.check()
        assert error == 0
        results.append(result)
    i = torch.arange(64 * BLOCKS)
    values = (i % 37).float()
    source = i // 64 * 64 + ((i % 64 ^ 3 ^ 1) + 32) % 64
    assert results[0] == results[1] == (2 * values[source]).tolist()


@pytest.mark.parametrize("mistake", REPORTED_BY_PLAIN)
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_plain_reports(toys: Runtime, mistake: str, seed: int) -> None:
    toys.seed(seed)
    error, _ = run(toys.library, MISTAKES.index(mistake))
    assert error != 0
    report = "\n".join(toys.reports())
    assert re.search(REPORTED_BY_PLAIN[mistake], report), report
    assert "fr::mistake_kernel" in report
    assert "block (" in report
    run(toys.library, RIGHT)  # the simulator is whole again
    toys.check()


@pytest.mark.parametrize("mistake", WRONG_IN_PLAIN)
def test_plain_computes_nan(toys: Runtime, mistake: str) -> None:
    toys.seed(0)
    _, result = run(toys.library, MISTAKES.index(mistake))
    assert torch.tensor(result).isnan().any()
    toys.reports()


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("mistake", REPORTED_BY_RACE)
def test_race_reports(race_toys: Runtime, mistake: str, seed: int) -> None:
    race_toys.reports()
    race_toys.seed(seed)
    run(race_toys.library, MISTAKES.index(mistake))
    report = "\n".join(race_toys.reports())
    assert re.search(REPORTED_BY_RACE[mistake], report), report
    assert "toys.cu:" in report


@pytest.mark.parametrize("mistake", ["kNothing", *REPORTED_BY_ASAN])
def test_asan_reports(mistake: str) -> None:
    library = simulator.build_toys("asan")
    command = [sys.executable, str(HERE / "toy_process.py"), str(library)]
    done = subprocess.run(
        [*command, str(MISTAKES.index(mistake))],
        env={**os.environ, **simulator.sanitizer_environment()},
        capture_output=True,
        text=True,
    )
    if mistake == "kNothing":
        assert done.returncode == 0, done.stderr
        assert "no report" in done.stdout
        return
    assert done.returncode != 0
    assert "no report" not in done.stdout
    assert re.search(REPORTED_BY_ASAN[mistake], done.stderr), done.stderr
    assert "mistake_kernel" in done.stderr


def test_memory_that_nobody_wrote_is_nan(simt: Simt) -> None:
    """So a kernel that leaves out an element of its result fails its test."""
    assert torch.empty(100).isnan().all()
