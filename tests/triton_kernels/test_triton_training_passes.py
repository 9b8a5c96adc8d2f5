"""The ends of blocks and stems and batch norm's numbers in Triton, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from covering import cover
from tolerances import assert_as_exact_as_pytorch
from torch import Tensor
from training_cases import affine, channel_sum, coarse, per_channel

from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.triton._bn_map import CONFIGS
from fused_resnet.backends.triton._channel_sums import channel_sums
from fused_resnet.backends.triton.block_end_backward import Recomputed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "resnet": (2, 64, 7, 7),
    "one-channel": (3, 1, 5, 5),
    "prime-channels": (2, 37, 5, 3),
    "one-pixel": (5, 16, 1, 1),
    # Several slabs, the last not full, and a block of channels that is not full.
    "blocks": (3, 67, 19, 23),
    "no-image": (0, 16, 4, 4),
}
LAST = torch.channels_last


def doubled(values):
    return tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
    )


def assert_sum(result: Tensor, terms: Tensor) -> None:
    """The sum of each channel's terms, rounded once to float32."""
    exact, size = channel_sum(terms), channel_sum(terms.double().abs())
    assert result.dtype is torch.float32
    assert ((result.double() - exact).abs() <= 1.2e-7 * exact.abs() + 1e-9 * size).all()


@cover(dtype=DTYPES, shape=SHAPES, kind=["none", "identity", "projected"], relu=[True, False])
def test_block_end(interpreted, dtype, shape, kind, relu):
    z, s = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype).contiguous(memory_format=LAST)
    bn, other = affine(shape[1], dtype), affine(shape[1], dtype)
    side = (None if kind == "none" else s, *(other[:2] if kind == "projected" else (None, None)))
    y = interpreted.ops.block_end(z, *bn[:2], *side, relu)
    operands = (z, *bn[:2], *side, relu)
    eager = reference.block_end(*(v.to(dtype) if isinstance(v, Tensor) else v for v in operands))
    assert_as_exact_as_pytorch(y, eager, reference.block_end(*doubled(operands)))
    assert y.is_contiguous(memory_format=LAST)


@cover(dtype=DTYPES, shape=SHAPES, shortcut=[True, False], mask=["y", "recomputed", "none"])
def test_block_end_backward(interpreted, dtype, shape, shortcut, mask):
    """Numbers are eighths: every sign is exact, so the mask from z is the mask from y."""
    dy, z, s = (coarse(*shape, dtype=dtype) for _ in range(3))
    bn, side = affine(shape[1], dtype), affine(shape[1], dtype)
    affines = (s, *side[:2]) if shortcut else (None, None, None)
    y = reference.block_end(*doubled((z, *bn[:2], *affines)), True).to(dtype)
    recomputed = Recomputed(*bn[:2], *affines[1:]) if mask == "recomputed" else None
    last = (s, side.mean) if shortcut else (None, None)
    g, sum_g, sum_g_xc, sum_g_side = interpreted.ops.block_end_backward(
        dy, y if mask == "y" else None, z, bn.mean, *last, True, recomputed=recomputed
    )
    expected = dy if mask == "none" else torch.where(y <= 0, 0, dy)
    if mask == "none":
        assert g.numel() == 0
    else:
        assert torch.equal(g, expected)
        assert g.is_contiguous(memory_format=LAST)
    wide = expected.double()
    assert_sum(sum_g, wide)
    assert_sum(sum_g_xc, wide * (z.double() - per_channel(bn.mean.double())))
    if shortcut:
        assert_sum(sum_g_side, wide * (s.double() - per_channel(side.mean.double())))
    else:
        assert sum_g_side.numel() == 0
    launched = [launch.kernel for launch in interpreted.launches()]
    assert launched[0] == "block_end_backward_kernel"
    alone = interpreted.ops.block_end_backward(dy, y, z, bn.mean, None, None, False)
    assert torch.equal(alone[0], torch.where(y <= 0, 0, dy))
    assert [t.numel() for t in alone[1:]] == [0, 0, 0]


def test_sums_that_cancel_keep_their_digits(interpreted):
    """Each lane adds many terms that are far larger than their sum."""
    dy = normal(2, 4, 60, 60, dtype=torch.float32)
    dy += 100.0 * dy.sign()
    dy -= dy.mean((0, 2, 3), keepdim=True)
    zero = torch.zeros(4)
    _, sum_g, _, _ = interpreted.ops.block_end_backward(
        dy, None, dy, zero, None, None, True, config=CONFIGS[-1]
    )
    truth = channel_sum(dy)
    assert (truth.abs() < 1e-7 * channel_sum(dy.abs())).all()
    torch.testing.assert_close(sum_g.double(), truth, rtol=1e-6, atol=1e-8)


def test_nan_passes_a_block_end(interpreted):
    """As through PyTorch's ReLU, and its gradient behind it, whichever map the mask is from."""
    z, dy = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    z[1, 2, 3, 3] = float("nan")
    one, zero = torch.ones(3), torch.zeros(3)
    y = interpreted.ops.block_end(z, one, zero, None, None, None, True)
    assert y.isnan().sum() == 1
    for given in ({"recomputed": Recomputed(one, zero)}, {}):
        g = interpreted.ops.block_end_backward(
            dy, None if given else y, z, zero, None, None, True, **given
        )[0]
        assert g.sum() == 1
        assert g[1, 2, 3, 3] == 1


@pytest.mark.parametrize("slabs", [1, 33, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slabs_are_added_once_each(interpreted, slabs, dtype):
    """By one program, and by many that a last one adds."""
    partial = normal(slabs, 3, 37, dtype=dtype)
    found = channel_sums(partial)
    for i, result in enumerate(found):
        torch.testing.assert_close(
            result.double(), partial[:, i].double().sum(0), rtol=1.2e-7, atol=1e-9
        )
    assert len(interpreted.launches()) == (1 if slabs <= 128 else 2)


# The stem

POOLS = {
    "resnet": ((3, 3), (2, 2), (1, 1)),
    "gaps": ((2, 2), (3, 3), (1, 1)),
    "all-pairs": ((3, 3), (1, 1), (1, 1)),
    "oblong": ((2, 3), (1, 2), (0, 1)),
}
STEMS = {"odd": (3, 16, 11, 13), "prime-channels": (2, 19, 9, 8), "one-channel": (1, 1, 7, 7),
         "no-image": (0, 16, 8, 8)}  # fmt: skip


@cover(dtype=DTYPES, shape=STEMS, pool=POOLS)
def test_stem_end(interpreted, dtype, shape, pool):
    z, bn = coarse(*shape, dtype=dtype), affine(shape[1], dtype)  # with ties
    y, index = interpreted.ops.stem_end(z, *bn[:2], *pool)
    expected, place = reference.stem_end(*doubled((z, *bn[:2])), *pool)
    assert torch.equal(y.double(), expected)
    assert y.dtype is dtype
    assert torch.equal(index, place)
    dy = coarse(*y.shape, dtype=dtype)
    backward = (dy, index, z, *bn, *pool)
    g, *sums = interpreted.ops.stem_end_backward(*backward, True)
    truth = reference.stem_end_backward(*doubled(backward), True)[0]
    assert torch.equal(g.double(), truth)  # sums of eighths are exact
    assert y.is_contiguous(memory_format=LAST)
    assert g.is_contiguous(memory_format=LAST)
    assert_sum(sums[0], truth)
    assert_sum(sums[1], truth * (z.double() - per_channel(bn.mean.double())))
    alone, *none = interpreted.ops.stem_end_backward(*backward, False)
    assert torch.equal(alone, g)
    assert [t.numel() for t in none] == [0, 0]


def test_nan_wins_a_pool(interpreted):
    z = torch.zeros(1, 3, 6, 6)
    z[0, 1, 2, 2] = z[0, 1, 3, 3] = float("nan")
    pool = POOLS["resnet"]
    y, index = interpreted.ops.stem_end(z, torch.ones(3), torch.zeros(3), *pool)
    expected, place = reference.stem_end(z, torch.ones(3), torch.zeros(3), *pool)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(index, place)


# Batch norm's numbers


@pytest.mark.parametrize("affine_bn", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("channels", [1, 300])
def test_coefficients(interpreted, affine_bn, channels):
    """Parameters are read in their own dtype; arithmetic is float64, rounded once."""
    mean, bias, g, g_xc = normal(4, channels, dtype=torch.float32)
    var = normal(channels, dtype=torch.float32).square()
    weight = None if affine_bn is None else normal(channels, dtype=affine_bn)
    bias = None if affine_bn is None else bias.to(affine_bn)
    eps, count = 2.0**-10, 21  # exact in float32
    found = interpreted.ops.bn_coefficients(mean, var, weight, bias, eps)
    found += interpreted.ops.bn_backward_coefficients(g, g_xc, mean, var, weight, eps, count)
    truth = reference.bn_coefficients(*doubled((mean, var, weight, bias)), eps)
    truth += reference.bn_backward_coefficients(*doubled((g, g_xc, mean, var, weight)), eps, count)
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1.2e-7, atol=1e-14)


@cover(dtype=DTYPES, count=[0, 2, 50], step=[1, 2])
def test_running_statistics(interpreted, dtype, count, step):
    mean, var = normal(37, dtype=torch.float32), normal(37, dtype=torch.float32).square()
    held = normal(2, 37 * step, dtype=dtype).abs()
    running = [t[::step] for t in held]
    before, beside = [t.double() for t in running], held[:, 1::2].clone()
    versions = [t._version for t in running]
    interpreted.ops.bn_update_running(mean, var, *running, 0.25, count)
    reference.bn_update_running(mean.double(), var.double(), *before, 0.25, count)
    for ours, exact in zip(running, before, strict=True):
        assert torch.equal(ours, exact.to(dtype)) or dtype is torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert [t._version for t in running] == versions
    if step == 2:
        assert torch.equal(held[:, 1::2], beside)


# Errors


def test_wrong_arguments(interpreted):
    z, v = torch.zeros(2, 16, 8, 8), torch.zeros(16)
    ops, pool = interpreted.ops, POOLS["resnet"]
    index, dy = torch.zeros(2, 16, 4, 4, dtype=torch.uint8), torch.zeros(2, 16, 4, 4)
    wrong = [
        (lambda: ops.block_end(z[0], v, v, None, None, None, True), "z: expected 4 dim"),
        (lambda: ops.block_end(z, v[1:], v, None, None, None, True), r"scale: expected shape \[16"),
        (lambda: ops.block_end(z, v, v, z[:1], None, None, True), "shortcut: expected shape"),
        (lambda: ops.block_end(z, v, v, z, v, None, True), "expected both or neither"),
        (lambda: ops.block_end(z, v, v, None, v, v, True), "shortcut: expected a tensor"),
        (lambda: ops.block_end_backward(z, z[1:], z, v, None, None, True), "y: expected shape"),
        (lambda: ops.block_end_backward(z, z, z, v, z, None, True), "expected both or neither"),
        (lambda: ops.stem_end(z, v, v, [16, 16], [1, 1], [4, 4]), "kernel: expected at most 255"),
        (lambda: ops.stem_end(z, v, v, [3, 3], [1, 1], [2, 2]), "padding: expected at most half"),
        (lambda: ops.stem_end(z, v, v, [11, 3], [1, 1], [1, 1]), "kernel: expected at most the"),
        (lambda: ops.stem_end_backward(z, index, z, v, v, v, *pool, True), "dy: expected shape"),
        (
            lambda: ops.stem_end_backward(dy, index[:1], z, v, v, v, *pool, True),
            "index: expected shape",
        ),
        (lambda: ops.bn_coefficients(v, v[1:], None, None, 1e-5), r"var: expected shape \[16\]"),
        (lambda: ops.bn_update_running(v, v, v.clone(), v.clone(), 0.1, 1), "more than 1 value"),
        (lambda: ops.bn_update_running(v, v, v.clone(), v.clone(), 0.1, -1), "count: expected"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="index: expected dtype uint8"):
        ops.stem_end_backward(dy, index.long(), z, v, v, v, *pool, True)
    with pytest.raises(TypeError, match="scale: expected dtype float32"):
        ops.block_end(z, v.half(), v, None, None, None, True)
