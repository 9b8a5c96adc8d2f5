"""Calls of programs: the object that holds the arguments, fakes, modes, and wrong arguments."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import normal
from programs import OPERATIONS, PLACES, Program, basic_block, encode, head
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import _C
from fused_resnet.ops import program_steps


def small(dtype: torch.dtype = torch.float32) -> Program:
    p = Program(8, dtype)
    head(p, basic_block(p, basic_block(p, 0, 8, winograd=True), 16, 2), 10)
    return p


def image(batch: int = 2, side: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = normal(batch, 8, side, side, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def held(p: Program, outputs: list[int] | None = None) -> _C.Program:
    return _C.Program(p.tensors, p.steps, outputs or [len(p)])


def assert_equal(results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(results) == len(expected)
    assert all(map(torch.equal, results, expected))


# The object may keep what it derived from its arguments, and must not use it where it is wrong.


def test_the_object_calls_the_operator():
    p, program = small(), held(small())
    program = held(p, [2, len(p)])
    for batch, side in ((2, 12), (2, 12), (1, 12), (2, 9), (0, 12), (2, 12)):
        x = image(batch, side)
        assert_equal(program(x), p.run(x, [2, len(p)]))


def test_the_object_at_another_number_of_threads():
    p = small()
    program, x = held(p), image(5)
    expected = p.run(x)
    for threads in (1, 3, 2, 7, 1):
        torch.set_num_threads(threads)
        assert_equal(program(x), expected)


def test_the_object_with_another_dtype_names_what_is_wrong():
    program, x = held(small()), image()
    program(x)
    # A packed weight of float64 has other elements where vectors have other lanes.
    with pytest.raises((ValueError, TypeError), match=r"step 0 \(conv\): packed: expected"):
        program(x.double())
    program(x)


def test_numbers_that_change_in_place_are_read():
    p = small()
    program, x = held(p), image()
    first = program(x)
    for tensor in p.tensors:
        tensor.mul_(1.5)
    assert_equal(program(x), p.run(x))
    assert not torch.equal(program(x)[0], first[0])


def test_memory_that_changes_is_read():
    """``load_state_dict(assign=True)`` and ``tensor.data = ...`` leave other memory behind."""
    p = small()
    program, x = held(p), image()
    program(x)
    for tensor in p.tensors:
        tensor.data = tensor * 0.5
    assert_equal(program(x), p.run(x))


def test_memory_that_is_gone_is_missed():
    p = small()
    program, x = held(p), image()
    expected = program(x)
    for tensor in p.tensors:
        nbytes, kept = tensor.untyped_storage().nbytes(), tensor.clone()
        tensor.untyped_storage().resize_(0)
        with pytest.raises(
            ValueError, match=r"run_program: step .* expected a storage of at least"
        ):
            program(x)
        tensor.untyped_storage().resize_(nbytes)
        tensor.copy_(kept)
        assert_equal(program(x), expected)


@pytest.mark.parametrize("change", ["resize_", "t_", "dtype"])
def test_a_tensor_that_changes_its_shape_is_missed(change):
    p = Program(16)
    p.linear(0, 16)
    program, x = held(p), image()[:, :, :1, :1].repeat(1, 2, 1, 1)
    program(x)
    weight = p.tensors[0]
    if change == "resize_":
        weight.resize_(8, 16)
    elif change == "t_":
        weight.t_()
    else:
        weight.data = weight.double()
    try:
        expected = p.run(x)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error), match=r"run_program: step 0 \(linear\)"):
            program(x)
    else:
        assert_equal(program(x), expected)


def test_operands_that_are_not_contiguous_are_read_at_every_call():
    p = small()
    doubled = [torch.stack([t, t], -1) for t in p.tensors]
    program, x = _C.Program([t[..., 0] for t in doubled], p.steps, [len(p)]), image()
    assert_equal(program(x), p.run(x))
    for tensor, other in zip(p.tensors, doubled, strict=True):
        tensor.mul_(2)
        other.mul_(2)
    assert_equal(program(x), p.run(x))


def test_the_tensors_go_with_the_object():
    numpy = pytest.importorskip("numpy")
    weight = numpy.ones((4, 8), dtype=numpy.float32)
    gone = weakref.ref(weight)
    steps = encode("linear", 0, tensor=0, out_channels=4)
    program = _C.Program([torch.from_numpy(weight), torch.zeros(4)], steps, [1])
    del weight
    x = image()[:, :, :1, :1]
    torch.testing.assert_close(program(x)[0], x.sum((1, 2, 3))[:, None].expand(2, 4))
    assert gone() is not None
    del program
    assert gone() is None


def test_a_number_of_no_program_is_refused():
    for number in (0, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"program: expected the number of one, got {number}"):
            torch.ops.fused_resnet.run_program.kept(image(), number)


def test_many_threads_call_one_object():
    p = small()
    program, inputs = held(p), [image(1 + i % 3, 8 + i % 4) for i in range(24)]
    expected = [p.run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for results, truth in zip(pool.map(program, inputs * 4), expected * 4, strict=True):
            assert_equal(results, truth)


# An ordinary operator to everything in PyTorch.


class Names(TorchDispatchMode):
    """The operators that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_an_operator():
    p, x = small(), image()
    expected = p.run(x)
    with Names() as names:
        results = held(p)(x)
    assert names.seen == ["fused_resnet::run_program"]
    assert_equal(results, expected)


def test_autograd_sees_an_operator():
    """It has no gradient, as no operation on packed weights has one."""
    p = small()
    program, x = held(p), image().requires_grad_()
    assert program(x)[0].requires_grad == p.run(x)[0].requires_grad
    with torch.no_grad():
        assert not program(x)[0].requires_grad
    with torch.inference_mode():
        assert program(x)[0].is_inference()


def test_the_fake_knows_shapes_and_strides():
    p = Program(3)
    x = p.conv(0, 8, 7, stride=2, pool=(3, 2, 1))
    x = p.conv(x, 12, dilation=2, groups=2, stride=2)
    x = p.add(x, p.conv(x, 12, 1))
    x = p.avg_pool(p.zero_pad(p.max_pool(x, 3, 1, 1), 3, 2), 2, 1, 1)
    head(p, x, 10)
    x = normal(2, 3, 65, 50, dtype=torch.float32)
    outputs = list(range(1, len(p) + 1))
    real = p.run(x, outputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = p.run(mode.from_tensor(x), outputs)
    describe = [(y.shape, y.stride(), y.dtype) for y in real]
    assert [(y.shape, y.stride(), y.dtype) for y in fake] == describe
    report = _C.program_report(p.tensors, p.steps, outputs, list(x.shape), x.dtype)
    assert [tuple(shape) for shape, *_ in report] == [tuple(y.shape) for y in real]


def test_flops_are_those_of_single_operations():
    p, x = small(), image()
    with FlopCounterMode(display=False) as whole:
        p.run(x)
    with FlopCounterMode(display=False) as single:
        p.one_by_one(x)
    assert whole.get_total_flops() == single.get_total_flops() > 0


def test_the_report_says_what_runs():
    p = Program(64)
    p.conv(p.conv(0, 64, winograd=True), 64)
    head(p, len(p), 10)
    report = _C.program_report(p.tensors, p.steps, [len(p)], [2, 64, 56, 56], torch.float32)
    assert [name for _, name, _ in report] == ["winograd 4x4", "direct", "", ""]
    assert [images for *_, images in report] == [2] * 4
    none = _C.program_report(p.tensors, p.steps, [len(p)], [0, 64, 56, 56], torch.float32)
    assert [images for *_, images in none] == [0] * 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_steps_are_encoded_as_the_extension_reads_them(operation):
    """``programs.encode`` has the places of csrc/program.h in numbers."""
    fields = {name: 2 + place for name, place in PLACES.items() if name != "operation"}
    fields |= {"activation": 1, "winograd": True, "ceil_mode": True}
    names = {"channels": "out_channels"}
    pairs = [n for n in fields if n.endswith(("kernel", "stride", "padding", "dilation"))]
    step = program_steps.Step(
        operation,
        **{names.get(n, n): (v, v) if n in pairs else v for n, v in fields.items()},
    )
    assert program_steps.encode([step]) == encode(operation, fields.pop("input"), **fields)
    assert program_steps.decode(program_steps.encode([step, step])) == [step, step]


# Wrong arguments.


def changed(step: int, **fields: int) -> Program:
    p = small()
    for name, value in fields.items():
        p.steps[24 * step + PLACES[name]] = value
    return p


WRONG = {
    "operation": (changed(0, operation=8), "step 0: operation: expected an int from 0 to 7, got 8"),
    "input": (changed(1, input=2), r"step 1 \(conv\): input: expected a value from 0 to 1, got 2"),
    "no input": (changed(1, input=-1), r"step 1 \(conv\): input: expected a value from 0 to 1"),
    "residual": (
        changed(1, residual=7),
        r"step 1 \(conv\): residual: expected a value from 0 to 1, got 7",
    ),
    "another residual": (
        changed(4, residual=1),
        r"step 4 \(conv\): residual: expected shape \[2, 16, 6, 6\], got \[2, 8, 12, 12\]",
    ),
    "tensors": (
        changed(0, tensor=15),
        r"step 0 \(conv\): tensors: expected 3 from index 15 on, got 17",
    ),
    "no tensors": (changed(0, tensor=-1), r"step 0 \(conv\): tensors: expected 3 from index -1"),
    "activation": (
        changed(0, activation=3),
        r"step 0 \(conv\): activation: expected an int from 0 to 2, got 3",
    ),
    "winograd": (changed(0, winograd=-1), r"step 0 \(conv\): winograd: expected 0 or 1, got -1"),
    "kernel": (changed(0, kernel=5), r"step 0 \(conv\): packed: expected shape"),
    # Rounded to vectors, which differ, 9 channels may or may not be as many as 8.
    "channels": (changed(0, out_channels=9), r"step 0 \(conv\): (packed|scale): expected shape"),
    "groups": (changed(0, groups=3), r"step 0 \(conv\): groups: expected a divisor of 8"),
    "map": (changed(6, tensor=0), r"step 6 \(linear\): weight: expected shape \[10, 16\], got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    p, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^run_program: {message}"):
        p.run(image())
    with pytest.raises(ValueError, match=message):
        held(p)(image())


@pytest.mark.parametrize(
    ("steps", "outputs", "message"),
    [
        ([], [1], "steps: expected a positive multiple of 24 ints, got 0"),
        ([0] * 25, [1], "steps: expected a positive multiple of 24 ints, got 25"),
        (encode("global_avg_pool", 0), [], "outputs: expected at least one value"),
        (encode("global_avg_pool", 0), [0], "outputs: expected values from 1 to 1, got 0"),
        (encode("global_avg_pool", 0), [2], "outputs: expected values from 1 to 1, got 2"),
        (encode("global_avg_pool", 0), [1, 1], "outputs: expected each value once, got 1 again"),
        (encode("linear", 0, tensor=0), [1], "x: expected shape"),
        (encode("max_pool", 0, kernel=3, stride=1, padding=2), [1], "pool_padding: expected at"),
        (encode("avg_pool", 0, kernel=30, stride=1), [1], "pool_kernel: expected at most"),
        (encode("zero_pad_shortcut", 0, zeros=-1, stride=1), [1], "zeros: expected an int from 0"),
        (encode("zero_pad_shortcut", 0, zeros=1), [1], "stride: expected two ints from 1"),
    ],
)
def test_programs_that_are_none_are_refused(steps, outputs, message):
    with pytest.raises(ValueError, match=f"run_program: .*{message}"):
        torch.ops.fused_resnet.run_program(image(), [], steps, outputs)
    with pytest.raises(ValueError, match=message):
        _C.program_report([], steps, outputs, [2, 8, 12, 12], torch.float32)


def test_a_vector_is_no_map():
    p = small()
    p.steps += encode("global_avg_pool", len(p))
    with pytest.raises(ValueError, match="4 dimensions"):
        torch.ops.fused_resnet.run_program(image(), p.tensors, p.steps, [8])
