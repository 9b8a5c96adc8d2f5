"""The stem on every backend: values, pooling windows, non-finite values, errors.

Every stem runs with elements of each size, and in the simulator's builds with each precision: which
registers an element comes to depends on both.
"""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, Conv, batch_norm, doubled, normal
from marks import ACTIVATIONS, half_precisions, on, on_gpu_kernels, rows
from precisions import BFLOAT16, FLOAT16, tensor_core_depth
from shapes import POOLS, RESNET, STEMS, TWO_STEPS, geometry, window
from stem_operands import EPS, Operands, check, one_kernel

FLAG = (True, False)
#: One whose convolution's columns lie at even places, one with odd ones.
EVEN_AND_ODD = [STEMS[2], STEMS[4]]
#: And one whose kernel's rows, of an odd length, are padded at their end; those of the others that
#: need it are padded at their front.
PADDED_ROWS = [*EVEN_AND_ODD, STEMS[8]]


@pytest.mark.variants
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stem(backend, precision, case):
    check(backend, case, precision, fused=one_kernel(backend, case, precision))


@pytest.mark.variants
@rows({"case": EVEN_AND_ODD, "pool": POOLS})
def test_maxpool_windows(backend, pool, case):
    check(backend, case, FLOAT16, pool=pool)


@on("cpu", "simulator", "device")
def test_whole_size(backend, precision):
    """224 x 224: several bands of rows on a CPU, many blocks on a GPU."""
    case = Conv("whole", (1, 3, 224, 224), 64, (7, 7), RESNET)
    check(backend, case, precision, fused=one_kernel(backend, case, precision))


@rows(fmt=list(FORMATS), bias=FLAG, affine=FLAG)
def test_operands_that_may_be_left_out(backend, fmt, bias, affine):
    check(backend, STEMS[2], BFLOAT16, fmt=fmt, bias=bias, affine=affine)


@rows(which=list(TWO_STEPS))
def test_what_no_kernel_takes_goes_in_two_steps(backend, which):
    case, pool = TWO_STEPS[which]
    check(backend, case, FLOAT16, fused=False, pool=pool)


@rows({"activation": ACTIVATIONS, "case": EVEN_AND_ODD})
def test_activations(backend, precision, activation, case):
    stem = Operands(case, precision)
    depth = tensor_core_depth(backend, stem.weight)
    result = stem.run(backend, activation=activation)
    precision.check(result, *stem.eager_and_truth({}, activation), depth)


@rows({"activation": ACTIVATIONS}, which=list(TWO_STEPS))
def test_activations_in_two_steps(backend, which, activation):
    case, pool = TWO_STEPS[which]
    stem = Operands(case, FLOAT16)
    result = stem.run(backend, **pool, activation=activation)
    FLOAT16.check(result, *stem.eager_and_truth(pool, activation))


@rows({"case": [STEMS[1], STEMS[4], STEMS[7]]}, activation=ACTIVATIONS)
def test_packed_equals_live(backend, precision, case, activation):
    stem = Operands(case, precision, bias=False)
    weight, bias, mean, var = doubled(stem.bn)
    scale = weight / torch.sqrt(var + EPS)
    wide = stem.bn[0].dtype
    live = stem.run(backend, activation=activation)
    with precision.set():
        packed = backend.ops.conv_bn_relu_maxpool_packed(
            stem.x,
            backend.ops.pack_conv_weight(stem.weight, 1),
            scale.to(wide),
            (bias - mean * scale).to(wide),
            list(stem.weight.shape),
            *geometry(case),
            *window({}),
            activation,
        )
    eps = torch.finfo(precision.dtype).eps
    rtol = 1e-13 if wide is torch.float64 else max(eps * 2, 1e-5)
    torch.testing.assert_close(packed, live, rtol=rtol, atol=rtol)
    assert packed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.variants
@half_precisions
@rows({"case": PADDED_ROWS}, value=[float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_what_they_should(backend, precision, case, value):
    """And no other: neither through what pads a kernel's row nor from the neighbouring pixels."""
    stem = Operands(case, precision, bias=False)
    for y, column in ((0, 0), (5, 6), (case.x[2] - 1, case.x[3] - 1), (8, case.x[3] - 1)):
        stem.x[0, :, y, column] = value
    _, truth = stem.eager_and_truth({})
    rtol = 3e-2 if precision is BFLOAT16 else 4e-3
    result = stem.run(backend)
    torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.variants
@pytest.mark.precisions("tf32", "float32")
@rows({"case": EVEN_AND_ODD, "value": [float("nan"), float("inf")]})
def test_non_finite_values_in_float32(backend, precision, case, value):
    stem = Operands(case, precision, bias=False)
    stem.x[0, :, 5, 6] = stem.x[0, :, case.x[2] - 1, case.x[3] - 1] = value
    _, truth = stem.eager_and_truth({})
    result = stem.run(backend)
    torch.testing.assert_close(result.double(), truth, rtol=4e-3, atol=4e-3, equal_nan=True)


@pytest.mark.variants
@rows({"case": [STEMS[2], STEMS[0], STEMS[4]]})
def test_views_give_what_their_copies_give(backend, case):
    """At addresses that aren't multiples of 16 too, where rows of x come by chunks or don't."""
    stem = Operands(case, FLOAT16, bias=False)
    n, c, h, w = stem.case.x
    x = normal(n + 1, c + 2, h + 1, 2 * w, dtype=torch.float16)[1:, 1:-1, 1:, ::2]
    # One element past a multiple of 16 bytes.
    flat = normal(1, 1, 1, n * c * h * w + 1, dtype=x.dtype).flatten()[1:]
    for view in (x, flat.view(n, h, w, c).permute(0, 3, 1, 2)):
        assert torch.equal(stem.run(backend, x=view), stem.run(backend, x=view.clone()))


@pytest.mark.variants
def test_empty_batch(backend):
    case = Conv("empty", (0, 3, 20, 20), 16, (7, 7), RESNET)
    assert Operands(case, FLOAT16).run(backend).shape == (0, 16, 5, 5)
    assert backend.launches() == []


def test_the_same_bits_in_any_order(backend):
    """Of threads or programs, whichever a backend has; two blocks of channels."""
    stem = Operands(Conv("odd", (2, 3, 45, 37), 72, (7, 7), RESNET), FLOAT16)
    results = [stem.run(backend) for _ in backend.orders()]
    assert len(results) > 1
    assert all(torch.equal(results[0], other) for other in results[1:])


def arguments(x, w, var=None, pool=((3, 3), (2, 2), (1, 1))):
    one = torch.ones(4)
    var = one if var is None else var
    return x, w, None, one, one, one, var, [1, 1], [0, 0], [1, 1], 1, EPS, *pool


def test_wrong_arguments_are_named(backend):
    x, w = torch.randn(1, 3, 9, 9).half(), torch.randn(4, 3, 3, 3).half()

    def call(*args, **options):
        return backend.ops.conv_bn_relu_maxpool(*arguments(*args, **options))

    with pytest.raises(TypeError, match="conv_bn_relu_maxpool: weight: expected dtype"):
        call(x, w.float())
    with pytest.raises(ValueError, match=r"conv_bn_relu_maxpool: (running_)?var: expected shape"):
        call(x, w, var=torch.ones(3))
    with pytest.raises(ValueError, match="pool_padding: expected at most half"):
        call(x, w, pool=((2, 2), (2, 2), (2, 2)))
    with pytest.raises(ValueError, match="pool_kernel: expected at most the padded map"):
        call(x, w, pool=((9, 9), (2, 2), (0, 0)))


@on_gpu_kernels
def test_float64_is_refused(backend):
    x, w = torch.randn(1, 3, 9, 9).double(), torch.randn(4, 3, 3, 3).double()
    with pytest.raises(TypeError, match="conv_bn_relu_maxpool: x: expected dtype"):
        backend.ops.conv_bn_relu_maxpool(*arguments(x, w))


def test_a_packed_weight_of_another_size_is_refused(backend):
    x, w, bn = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3), batch_norm(4, torch.float32)
    flat = backend.ops.pack_conv_weight(w, 1)[1:]
    with pytest.raises(ValueError, match="conv_bn_relu_maxpool_packed: packed: expected shape"):
        backend.ops.conv_bn_relu_maxpool_packed(
            x, flat, bn[0], bn[1], [4, 3, 3, 3], [1, 1], [0, 0], [1, 1], 1, *window({})
        )
