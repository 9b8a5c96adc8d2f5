"""The memory of results on the CPU: used again when it is free, and never before."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import normal

from fused_resnet import _C, ops

# A result of 512 KiB: large enough to be kept, see csrc/cpu/result_cache.cpp.
SHAPE = (2, 16, 64, 64)


def block(x: torch.Tensor) -> torch.Tensor:
    """A residual block whose convolutions are all zero: relu(x + shift of the last one)."""
    zero = torch.zeros(16, 16, 3, 3)
    packed = [ops.pack_conv_weight(zero)] * 2
    scale, shift = [torch.ones(16)] * 2, [torch.zeros(16), torch.ones(16)]
    return ops.residual_block(x, packed, scale, shift, bottleneck=False)


@pytest.fixture
def x() -> torch.Tensor:
    x = normal(*SHAPE, dtype=torch.float32)
    return x.contiguous(memory_format=torch.channels_last)


def test_memory_comes_back(x):
    first = block(x)
    place = first.data_ptr()
    assert block(x).data_ptr() != place
    del first
    assert place in {result.data_ptr() for result in [block(x), block(x)]}


def test_a_view_keeps_its_memory(x):
    view = block(x)[:, :1]
    kept = view.clone()
    for _ in range(3):
        block(-x)
    assert torch.equal(view, kept)


def test_a_result_is_a_tensor_like_any(x):
    y = block(x)
    expected = torch.relu(x + 1)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.mul_(2).resize_(y.numel() // 2)
    assert torch.equal(y, 2 * expected.permute(0, 2, 3, 1).reshape(-1)[: y.numel()])


def test_a_result_does_not_grow(x):
    """PyTorch has no allocator for its memory, and says so before anything is written."""
    y = block(x)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(4 * y.numel())
    assert torch.equal(block(x), torch.relu(x + 1))


def test_threads_do_not_share_results(x):
    def run(i: int) -> bool:
        held = [block(x + i) for _ in range(4)]
        return all(torch.equal(y, torch.relu(x + i + 1)) for y in held)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(32)))


def test_results_outlive_the_thread_that_made_them(x):
    with ThreadPoolExecutor(1) as thread:
        y = thread.submit(block, x).result()
    assert torch.equal(y, torch.relu(x + 1))


def forget_peaks(x):
    """What earlier tests had in use at once: the bound looks back two thousand results."""
    for _ in range(2000):
        block(x[:1].contiguous())


def test_no_more_is_kept_than_was_in_use(x):
    forget_peaks(x)
    _C.release_results()
    assert _C.kept_result_bytes() == 0
    size = x.numel() * 4
    results = [block(x) for _ in range(64)]
    del results
    kept = _C.kept_result_bytes()
    assert kept >= 64 * size
    # Others of another size take the place of these, and are not kept beside them.
    results = [block(x[:1].contiguous()) for _ in range(128)]
    assert _C.kept_result_bytes() <= size
    del results
    _C.release_results()
    assert _C.kept_result_bytes() == 0


def test_a_peak_is_forgotten(x):
    """Two thousand results later what one step needed is no longer kept, but for 32 MiB."""
    _C.release_results()
    results = [block(x) for _ in range(128)]
    del results
    assert _C.kept_result_bytes() >= 128 * x.numel() * 4
    small = x[:1].contiguous()
    for _ in range(1100 * 2):
        block(small)
    assert _C.kept_result_bytes() <= 32 * 2**20


def test_maps_of_many_sizes_are_kept(x):
    """Together they are more than is in use at one time; the system would clear each anew."""
    forget_peaks(x)
    _C.release_results()
    sizes = [x[:1, :, :rows].contiguous() for rows in range(32, 65, 4)]
    for small in sizes:
        block(small)
    assert _C.kept_result_bytes() >= sum(small.numel() * 4 for small in sizes)


def number_from(program: str) -> int:
    """What a program prints in a fresh process, with the package that is tested here."""
    path = os.pathsep.join([str(Path(_C.__file__).parents[1]), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(run.stdout)


# Every second of 16 results of 16 MiB goes. The C library would keep those among its own memory,
# once a block of 16 MiB was freed to it, as torch.zeros' is here.
LARGE_RESULTS = """
import gc, resource, torch
from fused_resnet import _C
from test_result_cache import block

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

x = torch.zeros(4, 16, 256, 256).contiguous(memory_format=torch.channels_last)
del x
x = torch.zeros(4, 16, 256, 256).contiguous(memory_format=torch.channels_last)
results = [block(x) for _ in range(16)]
before = resident()
del results[::2]
gc.collect()
_C.release_results()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_results_leave_the_process():
    assert number_from(LARGE_RESULTS) >= 7 * 2**24


# A result of 96 MiB takes the pages of three of 32 MiB, and of those that are 1 MiB longer.
OTHER_SIZES = """
import resource, torch
from fused_resnet import _C
from test_result_cache import block

torch.set_num_threads(1)

def image(rows):
    x = torch.zeros(1, 16, rows, 256).contiguous(memory_format=torch.channels_last)
    return x.add_(torch.arange(rows).view(1, 1, -1, 1))

large, small, odd = image(6144), image(2048), image(2112)
results = [block(small if i % 2 else odd) for i in range(8)]
del results
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
result = block(large)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert torch.equal(result, torch.relu(large + 1))
others = [block(small) for _ in range(3)]
assert all(torch.equal(other, torch.relu(small + 1)) for other in others)
assert torch.equal(result, torch.relu(large + 1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems move no pages")
def test_a_result_of_another_size_takes_the_pages_of_old_ones():
    """The system clears no page for it: 48 huge ones, or 24,576 small ones."""
    assert number_from(OTHER_SIZES) < 24
