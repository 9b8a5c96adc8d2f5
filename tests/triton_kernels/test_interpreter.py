# ruff: noqa: N803  (compile-time arguments of kernels)
"""The hardened interpreter, tested: kernels that are wrong on purpose must be reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import Interpreter, InterpreterFault, bfloat16_bits, tf32
from triton.tools.tensor_descriptor import TensorDescriptor


@pytest.fixture(autouse=True)
def interpreter():
    with Interpreter() as entered:
        yield entered


# Memory


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + i, tl.load(x_ptr + i + shift, mask=i < n, other=0.0), mask=i < n)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i + shift))


def copy(x, y, n=None, shift=0, grid=3, masked=True):
    copy_kernel[(grid,)](x, y, n or x.numel(), shift, BLOCK=16, MASKED=masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_what_is_right_passes(interpreter, dtype):
    x = torch.arange(40).to(dtype)
    y = torch.empty_like(x)
    copy(x, y)
    assert torch.equal(x, y)
    (launch,) = interpreter.launches()
    assert (launch.kernel, launch.grid) == ("copy_kernel", (3, 1, 1))
    assert launch.constants == {"BLOCK": 16, "MASKED": True}


def test_a_load_past_the_end():
    with pytest.raises(InterpreterFault, match="load out of bounds of copy_kernel's x_ptr: 1 of 8"):
        copy(torch.zeros(40), torch.zeros(40), shift=1)
    with pytest.raises(InterpreterFault, match="the first 160 bytes from its beginning, of 160"):
        copy(torch.zeros(40), torch.zeros(48), masked=False)


def test_a_load_before_the_beginning():
    with pytest.raises(InterpreterFault, match="load out of bounds of copy_kernel's x_ptr: 1 of"):
        copy(torch.zeros(40), torch.zeros(40), shift=-1)


def test_a_store_past_the_end():
    with pytest.raises(InterpreterFault, match="store out of bounds of copy_kernel's y_ptr"):
        copy(torch.zeros(48), torch.zeros(40), masked=False)


def test_a_neighbour_in_the_same_storage():
    """What lies behind a slice is memory that exists, and still not the kernel's."""
    whole = torch.zeros(100)
    with pytest.raises(InterpreterFault, match="load out of bounds of copy_kernel's x_ptr"):
        copy(whole[:40], torch.zeros(40), shift=1)
    wide = torch.zeros(4, 20)[:, :10]
    copy(wide, torch.zeros(70), n=70, grid=5)
    with pytest.raises(InterpreterFault, match="load out of bounds"):
        copy(wide, torch.zeros(71), n=71, grid=5)


@triton.jit
def other_pointer_kernel(x_ptr, y_ptr, distance):
    tl.store(y_ptr, tl.load(x_ptr + distance))


def test_another_tensor_at_that_address():
    x, y = torch.zeros(4), torch.zeros(4)
    with pytest.raises(InterpreterFault, match="load out of bounds of other_pointer_kernel's x"):
        other_pointer_kernel[(1,)](x, y, (y.data_ptr() - x.data_ptr()) // 4)


@triton.jit
def same_place_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


def test_two_programs_store_to_one_address():
    same_place_kernel[(1,)](torch.zeros(1))
    with pytest.raises(InterpreterFault, match=r"race: program 1 stores .* where program 0 stores"):
        same_place_kernel[(2,)](torch.zeros(1))


@triton.jit
def same_lane_kernel(y_ptr):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i // 2, i.to(tl.float32))


def test_two_lanes_store_to_one_address():
    with pytest.raises(InterpreterFault, match="two lanes of one store of program 0 write one"):
        same_lane_kernel[(1,)](torch.zeros(16))


@triton.jit
def shift_kernel(x_ptr, BY: tl.constexpr):
    p = tl.program_id(0)
    tl.store(x_ptr + p, tl.load(x_ptr + p + BY))


@triton.jit
def shift_back_kernel(x_ptr):
    p = tl.program_id(0) + 1
    tl.store(x_ptr + p, tl.load(x_ptr + p - 1))


def test_a_program_loads_what_another_stores():
    shift_kernel[(4,)](torch.zeros(5), BY=0)
    with pytest.raises(InterpreterFault, match=r"race: program 1 stores .* where program 0 loads"):
        shift_kernel[(4,)](torch.zeros(5), BY=1)
    with pytest.raises(
        InterpreterFault, match=r"race: program 1 loads of .* what program 0 stores"
    ):
        shift_back_kernel[(4,)](torch.zeros(5))


@triton.jit
def atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


def test_atomics_are_refused():
    with pytest.raises(InterpreterFault, match="atomic_rmw has no place in a deterministic"):
        atomic_kernel[(1,)](torch.zeros(1))


@triton.jit
def masked_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 16)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_lanes_without_another_value_are_nan(dtype):
    y = torch.zeros(16, dtype=dtype)
    masked_kernel[(1,)](torch.ones(5, dtype=dtype), y, 5)
    assert (y[:5] == 1).all()
    assert y[5:].isnan().all()


def test_memory_that_nobody_wrote_is_nan():
    y = torch.empty(48)
    copy(torch.zeros(40), y, n=40)
    assert y.isnan().sum() == 8


def test_a_grid_that_no_card_has():
    for grid in (0, -1):
        with pytest.raises(InterpreterFault, match="a card has no grid"):
            copy(torch.zeros(16), torch.zeros(16), grid=grid)


def test_programs_run_in_another_order(interpreter):
    x, results = torch.arange(640.0), []
    for interpreter.seed in (0, 1, 2):
        y = torch.empty_like(x)
        copy(x, y, grid=40)
        results.append(y)
    assert all(torch.equal(x, y) for y in results)


@triton.jit
def descriptor_kernel(x_desc, y_ptr, row, WIDTH: tl.constexpr):
    v = x_desc.load([row, 0])
    i, j = tl.arange(0, 8), tl.arange(0, WIDTH)
    tl.store(y_ptr + i[:, None] * WIDTH + j[None, :], v)


def test_descriptors_fill_what_is_past_the_end_with_zeros():
    x = torch.arange(1.0, 41.0).view(5, 8).half()
    y = torch.empty(8, 16, dtype=torch.float16)
    descriptor_kernel[(1,)](TensorDescriptor(x, [5, 8], [8, 1], [8, 16]), y, 2, WIDTH=16)
    assert torch.equal(y[:3, :8], x[2:])
    assert not y[3:].any()
    assert not y[:, 8:].any()


def test_a_descriptor_that_is_larger_than_its_tensor():
    x = torch.zeros(5, 8).half()
    y = torch.empty(8, 16, dtype=torch.float16)
    with pytest.raises(InterpreterFault, match="load out of bounds of descriptor_kernel's x_desc"):
        descriptor_kernel[(1,)](TensorDescriptor(x, [6, 8], [8, 1], [8, 16]), y, 0, WIDTH=16)


# Numbers


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        v = a + b
    elif OP == "mul":
        v = a * b
    elif OP == "less":
        v = tl.where(a < b, a, b)
    elif OP == "negative":
        v = -a
    elif OP == "through":
        v = (a.to(tl.float32) * 1.7).to(a.dtype)
    elif OP == "integer":
        v = i.to(a.dtype)
    tl.store(y_ptr + i, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["add", "mul", "less", "negative", "through", "integer"])
def test_arithmetic_is_by_value(dtype, op):
    a, b = torch.randn(2, 256).to(dtype)
    expected = {
        "add": a + b,
        "mul": a * b,
        "less": torch.where(a < b, a, b),
        "negative": -a,
        "through": (a.float() * 1.7).to(dtype),
        "integer": torch.arange(256).to(dtype),
    }[op]
    y = torch.empty_like(a)
    arithmetic_kernel[(1,)](a, b, y, N=256, OP=op)
    assert torch.equal(y, expected)


def test_conversions_to_bfloat16_are_torchs():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    ours = torch.from_numpy(bfloat16_bits(values.numpy()).view(np.int16)).view(torch.bfloat16)
    theirs = values.to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~ours.isnan()])


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(y_ptr + at, product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_are_exact(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    y = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, y, N=32, PRECISION="ieee")
    torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tensor_cores_drop_the_low_bits():
    a, b = torch.randn(2, 32, 32)
    y = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, y, N=32, PRECISION="tf32")
    exact = a.double() @ b.double()
    assert 2e-4 < (y - exact).norm() / exact.norm() < 2e-3
    low = [torch.from_numpy(tf32(t.numpy())).double() for t in (a, b)]
    torch.testing.assert_close(y.double(), low[0] @ low[1], rtol=1e-5, atol=1e-5)


@triton.jit
def sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


def test_reductions_of_bfloat16_are_refused():
    y = torch.zeros(1)
    sum_kernel[(1,)](torch.ones(16), y, N=16)
    assert y.item() == 16
    with pytest.raises(InterpreterFault, match="reduction of bfloat16"):
        sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.zeros(1).bfloat16(), N=16)


def test_what_was_patched_is_put_back(interpreter):
    """Else nothing could be compiled in the same process."""
    assert not tl.core.is_builtin(tl.arange)
    interpreter.__exit__()
    try:
        for place in (tl, tl.core):
            assert tl.core.is_builtin(place.arange)
        assert not torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError):
            tl.sum(1)
    finally:
        interpreter.__enter__()
