"""The end of a block, the end of the stem and batch norm's numbers, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from cases import MAPS, normal
from covering import cover
from tolerances import DTYPES, assert_as_exact_as_pytorch
from torch.nn import functional
from training_cases import Affine, affine, channel_sum, coarse, per_channel, vectors_of

import fused_resnet  # noqa: F401  the operators

OPS = torch.ops.fused_resnet
SHAPES = MAPS | {
    # Rows of four and what is left; a vector and a tail of it; blocks of rows, the last not full.
    "blocks": (3, 67, 19, 23),
    "cifar": (5, 16, 17, 15),
    "no-image": (0, 16, 4, 4),
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHORTCUTS = ("none", "identity", "projected")


def block_end(z, bn, shortcut, shortcut_bn, relu):
    y = z * per_channel(bn.scale.to(z)) + per_channel(bn.shift.to(z))
    if shortcut_bn is not None:
        shortcut = shortcut * per_channel(shortcut_bn.scale.to(z))
        shortcut = shortcut + per_channel(shortcut_bn.shift.to(z))
    if shortcut is not None:
        y = y + shortcut
    return functional.relu(y) if relu else y


# The storage type and the operands choose the loop, the format the order of its rows.
@cover({"dtype": DTYPES, "kind": SHORTCUTS, "fmt": FORMATS}, shape=SHAPES, relu=[True, False])
def test_block_end(dtype, shape, fmt, kind, relu):
    z, s = (normal(*shape, dtype=dtype).contiguous(memory_format=fmt) for _ in range(2))
    bn, other = affine(shape[1], dtype), affine(shape[1], dtype)
    shortcut = None if kind == "none" else s
    shortcut_bn = other if kind == "projected" else None
    scale, shift, _ = shortcut_bn or (None, None, None)
    y = OPS.block_end(z, *bn[:2], shortcut, scale, shift, relu)
    operands = (z, bn, shortcut, shortcut_bn)
    doubled = tuple(t.double() if t is not None else None for t in operands)
    assert_as_exact_as_pytorch(y, block_end(*operands, relu), block_end(*doubled, relu))
    assert y.is_contiguous(memory_format=torch.channels_last)


def assert_sum(result, terms):
    """The sum of each channel's terms, as near as float32 additions in blocks bring it."""
    exact, size = channel_sum(terms), channel_sum(terms.double().abs())
    bound = 1e-13 if result.dtype is torch.float64 else 3e-7
    assert ((result.double() - exact).abs() <= bound * size).all()


@cover(
    {"dtype": DTYPES, "shortcut": [True, False], "relu": [True, False]}, shape=SHAPES, fmt=FORMATS
)
def test_block_end_backward(dtype, shape, fmt, shortcut, relu):
    dy, y, z, s = (coarse(*shape, dtype=dtype).contiguous(memory_format=fmt) for _ in range(4))
    mean, other = affine(shape[1], dtype).mean, affine(shape[1], dtype).mean
    g, sum_g, sum_g_xc, sum_g_shortcut_xc = OPS.block_end_backward(
        dy, y if relu else None, z, mean, s if shortcut else None, other if shortcut else None, True
    )
    expected = torch.where(y <= 0, 0, dy) if relu else dy
    if relu:
        assert torch.equal(g, expected)
        assert g.is_contiguous(memory_format=torch.channels_last)
    else:
        assert g.numel() == 0
    wide = expected.double()
    assert sum_g.dtype is vectors_of(dtype)
    assert_sum(sum_g, wide)
    assert_sum(sum_g_xc, wide * (z.double() - per_channel(mean.double())))
    if shortcut:
        assert_sum(sum_g_shortcut_xc, wide * (s.double() - per_channel(other.double())))
    else:
        assert sum_g_shortcut_xc.numel() == 0
    only_g = OPS.block_end_backward(dy, y, z, mean, None, None, False)
    assert torch.equal(only_g[0], torch.where(y <= 0, 0, dy))
    assert all(t.numel() == 0 for t in only_g[1:])


#: Stored past the caches, as lines are whole; not so.
LARGE = {"whole-lines": (1, 64, 288, 289), "parts-of-lines": (1, 24, 472, 471)}
large = pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)


@large
def test_large_ends_of_blocks(shape):
    test_block_end(torch.float32, shape, torch.channels_last, "projected", relu=True)
    test_block_end_backward(torch.float32, shape, torch.channels_last, shortcut=True, relu=True)


def test_nan_passes_a_block_end():
    """As through PyTorch's ReLU, and its gradient behind it."""
    z, dy = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    z[1, 2, 3, 3] = float("nan")
    one, zero = torch.ones(3), torch.zeros(3)
    y = OPS.block_end(z, one, zero, None, None, None, True)
    assert y.isnan().sum() == 1
    g = OPS.block_end_backward(dy, y, z, zero, None, None, True)[0]
    assert g.sum() == 1
    assert g[1, 2, 3, 3] == 1


# The stem


POOLS = {
    "resnet": (3, 2, 1),
    "no-overlap": (2, 2, 0),
    "gaps": (2, 3, 1),
    "all-pairs": (3, 1, 1),
    "oblong": ((2, 3), (1, 2), (0, 1)),
}
MAPS_OF_STEMS = {
    "even": (2, 64, 12, 14),
    "odd": (3, 16, 11, 13),
    "prime-channels": (2, 19, 9, 8),
    "one-channel": (1, 1, 7, 7),
    # More pixels in a row than are added in float32.
    "wide": (1, 4, 5, 700),
    "no-image": (0, 16, 8, 8),
}


def pairs(pool):
    return [list(v) if isinstance(v, tuple) else [v, v] for v in pool]


def places(index, width, pool):
    """PyTorch's index into the plane as a place in the window."""
    (_, kw), (sh, sw), (ph, pw) = pairs(pool)
    oy, ox = torch.arange(index.shape[2]), torch.arange(index.shape[3])
    rows = index // width - (oy * sh - ph)[:, None]
    return rows * kw + index % width - (ox * sw - pw)


@cover({"dtype": DTYPES, "pool": POOLS}, shape=MAPS_OF_STEMS, fmt=FORMATS)
def test_stem_end(dtype, shape, pool, fmt):
    z = coarse(*shape, dtype=dtype).contiguous(memory_format=fmt)  # with ties
    bn = affine(shape[1], dtype)
    y, index = OPS.stem_end(z, *bn[:2], *pairs(pool))
    plain = block_end(z.to(vectors_of(dtype)), bn, None, None, True).to(dtype)
    if shape[0] == 0:
        assert y.shape == (
            0,
            *functional.max_pool2d(plain.new_zeros(1, *shape[1:]), *pool).shape[1:],
        )
        return
    expected, at = functional.max_pool2d(plain, *pool, return_indices=True)
    assert torch.equal(y, expected)
    assert index.dtype is torch.uint8
    assert torch.equal(index.long(), places(at, shape[3], pool))
    assert y.is_contiguous(memory_format=torch.channels_last)


# The window and the map decide together which places are summed.
@cover({"shape": MAPS_OF_STEMS, "pool": POOLS}, dtype=DTYPES)
def test_stem_end_backward(dtype, shape, pool):
    z, bn = coarse(*shape, dtype=dtype), affine(shape[1], dtype)
    y, index = OPS.stem_end(z, *bn[:2], *pairs(pool))
    dy = coarse(*y.shape, dtype=dtype)
    g, sum_g, sum_g_xc = OPS.stem_end_backward(dy, index, z, *bn, *pairs(pool), True)
    if shape[0] == 0:
        assert g.shape == z.shape
        assert not sum_g.any()
        assert not sum_g_xc.any()
        return
    leaf = (
        block_end(z.double(), Affine(*(t.double() for t in bn)), None, None, True)
    ).requires_grad_()
    functional.max_pool2d(leaf, *pool).backward(dy.double())
    expected = torch.where(leaf > 0, leaf.grad, 0)
    assert torch.equal(g.double(), expected)  # sums of eighths are exact
    assert_sum(sum_g, expected)
    assert_sum(sum_g_xc, expected * (z.double() - per_channel(bn.mean.double())))
    g2, *none = OPS.stem_end_backward(dy, index, z, *bn, *pairs(pool), False)
    assert torch.equal(g2, g)
    assert all(t.numel() == 0 for t in none)


@large
def test_large_ends_of_stems(shape):
    test_stem_end_backward(torch.float32, shape, (3, 2, 1))


def test_nan_wins_a_pool():
    z = torch.zeros(1, 3, 6, 6)
    z[0, 1, 2, 2] = z[0, 1, 3, 3] = float("nan")
    y, index = OPS.stem_end(z, torch.ones(3), torch.zeros(3), [3, 3], [2, 2], [1, 1])
    expected, at = functional.max_pool2d(functional.relu(z), 3, 2, 1, return_indices=True)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(index.long(), places(at, 6, (3, 2, 1)))


# Batch norm's numbers


vector_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@vector_dtypes
@pytest.mark.parametrize("affine_bn", [True, False])
def test_coefficients(dtype, affine_bn):
    mean, var = normal(37, dtype=dtype), normal(37, dtype=dtype).square()
    weight = normal(37, dtype=dtype) if affine_bn else None
    bias = normal(37, dtype=dtype) if affine_bn else None
    scale, shift = OPS.bn_coefficients(mean, var, weight, bias, 1e-3)
    gamma = weight.double() if affine_bn else 1
    exact = gamma / (var.double() + 1e-3).sqrt()
    exact_shift = (bias.double() if affine_bn else 0) - mean.double() * exact
    assert scale.dtype is shift.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(scale.double(), exact, rtol=eps, atol=0)
    torch.testing.assert_close(shift.double(), exact_shift, rtol=eps, atol=2 * 2.3e-16)


@vector_dtypes
@pytest.mark.parametrize("count", [0, 2, 50])
def test_running_statistics(dtype, count):
    x = normal(5, 37, 2, 5, dtype=dtype, shift=2.0)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    running = [normal(37, dtype=dtype), normal(37, dtype=dtype).square()]
    before = [t.double().clone() for t in running]
    assert OPS.bn_update_running(mean.to(dtype), var.to(dtype), *running, 0.3, count) is None
    unbiased = var * count / max(count - 1, 1)
    for ours, old, new in zip(running, before, (mean, unbiased), strict=True):
        expected = (old + 0.3 * (new - old)).to(dtype) if count else old.to(dtype)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_running_statistics_are_pytorchs():
    """nn.BatchNorm2d's own after one step, which leaves the version counter alone too."""
    x = normal(4, 19, 5, 3, dtype=torch.float32, shift=1.0)
    bn, plain = torch.nn.BatchNorm2d(19), torch.nn.BatchNorm2d(19)
    plain(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    version = bn.running_mean._version
    OPS.bn_update_running(mean, var, bn.running_mean, bn.running_var, 0.1, 60)
    torch.testing.assert_close(bn.running_mean, plain.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bn.running_var, plain.running_var, rtol=1e-6, atol=1e-7)
    assert bn.running_mean._version == version == plain.running_mean._version


@vector_dtypes
@pytest.mark.parametrize("affine_bn", [True, False])
def test_backward_coefficients(dtype, affine_bn):
    """a, b and c give batch norm's own gradient."""
    x = normal(4, 19, 5, 3, dtype=torch.float64, shift=1.0)
    dy = normal(4, 19, 5, 3, dtype=torch.float64)
    weight = normal(19, dtype=torch.float64).requires_grad_() if affine_bn else None
    bias = torch.zeros(19, dtype=torch.float64).requires_grad_() if affine_bn else None
    leaf = x.clone().requires_grad_()
    functional.batch_norm(leaf, None, None, weight, bias, True, 0.1, 1e-3).backward(dy)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    sums = channel_sum(dy), channel_sum(dy * (x - per_channel(mean)))
    given = [t.to(dtype) for t in (*sums, mean, var)]
    gamma = weight.detach().to(dtype) if affine_bn else None
    a, b, c, dweight, dbias = OPS.bn_backward_coefficients(*given, gamma, 1e-3, 60)
    dx = per_channel(a) * dy + per_channel(b) * x + per_channel(c)
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(dx, leaf.grad, **tolerance)
    if affine_bn:
        torch.testing.assert_close(dweight.double(), weight.grad, **tolerance)
        torch.testing.assert_close(dbias.double(), bias.grad, **tolerance)


def test_backward_coefficients_of_nothing():
    zero = torch.zeros(5)
    results = OPS.bn_backward_coefficients(zero, zero, zero, zero, None, 1e-5, 0)
    assert all(t.isfinite().all() for t in results)
    assert not results[1].any()
    assert not results[2].any()


# Errors


def test_wrong_arguments():
    z, v = torch.zeros(2, 16, 8, 8), torch.zeros(16)
    pool = ([3, 3], [2, 2], [1, 1])
    index = torch.zeros(2, 16, 4, 4, dtype=torch.uint8)
    dy = torch.zeros(2, 16, 4, 4)
    wrong = [
        (lambda: OPS.block_end(z[0], v, v, None, None, None, True), "block_end: z: expected 4"),
        (
            lambda: OPS.block_end(z, v[1:], v, None, None, None, True),
            r"scale: expected shape \[16\]",
        ),
        (lambda: OPS.block_end(z, v, v, z[:1], None, None, True), "shortcut: expected shape"),
        (lambda: OPS.block_end(z, v, v, z, v, None, True), "expected both or neither"),
        (lambda: OPS.block_end(z, v, v, None, v, v, True), "shortcut: expected a tensor"),
        (lambda: OPS.block_end_backward(z, z[1:], z, v, None, None, True), "y: expected shape"),
        (lambda: OPS.block_end_backward(z, z, z, v, z, None, True), "expected both or neither"),
        (lambda: OPS.stem_end(z, v, v, [16, 16], [1, 1], [4, 4]), "kernel: expected at most 255"),
        (lambda: OPS.stem_end(z, v, v, [3, 3], [1, 1], [2, 2]), "padding: expected at most half"),
        (
            lambda: OPS.stem_end(z, v, v, [11, 3], [1, 1], [1, 1]),
            "kernel: expected at most the pad",
        ),
        (
            lambda: OPS.stem_end_backward(z, index, z, v, v, v, *pool, True),
            "dy: expected shape",
        ),
        (
            lambda: OPS.stem_end_backward(dy, index[:1], z, v, v, v, *pool, True),
            "index: expected shape",
        ),
        (lambda: OPS.bn_coefficients(v, v[1:], None, None, 1e-5), r"var: expected shape \[16\]"),
        (lambda: OPS.bn_update_running(v, v, v.clone(), v.clone(), 0.1, 1), "more than 1 value"),
        (lambda: OPS.bn_update_running(v, v, v.clone(), v.clone(), 0.1, -1), "count: expected"),
        (
            lambda: OPS.bn_backward_coefficients(v, v, v, v, v[1:], 1e-5, 4),
            r"weight: expected shape \[16\]",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="index: expected dtype uint8"):
        OPS.stem_end_backward(dy, index.long(), z, v, v, v, *pool, True)
    with pytest.raises(TypeError, match="scale: expected dtype Double for maps of Double"):
        OPS.block_end(z.double(), v, v, None, None, None, True)


def test_bits_do_not_depend_on_threads():
    z, y, dy = (torch.randn(4, 40, 33, 31) for _ in range(3))
    bn = affine(40, torch.float32)
    pool = pairs(POOLS["resnet"])
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ends = OPS.block_end_backward(dy, y, z, bn.mean, y, bn.shift, True)
        _, index = OPS.stem_end(z, *bn[:2], *pool)
        stem = OPS.stem_end_backward(index.float(), index, z, *bn, *pool, True)
        runs.append((*ends, *stem))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
