"""The ends of blocks and batch norm's numbers in CUDA C++, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from covering import cover
from tolerances import assert_as_exact_as_pytorch
from torch import Tensor
from training_cases import affine, channel_sum, coarse, per_channel, widened

from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.activation import Activation, gradient

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


def assert_sum(result: Tensor, terms: Tensor) -> None:
    """The sum of each channel's terms, rounded once to float32."""
    exact, size = channel_sum(terms), channel_sum(terms.double().abs())
    assert result.dtype is torch.float32
    assert ((result.double() - exact).abs() <= 1.2e-7 * exact.abs() + 1e-9 * size).all()


@pytest.mark.variants
@cover(
    dtype=DTYPES, shape=SHAPES, kind=["none", "identity", "projected"], activation=list(Activation)
)
def test_block_end(simt, dtype, shape, kind, activation):
    z, s = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype).contiguous(memory_format=LAST)
    bn, other = affine(shape[1], dtype), affine(shape[1], dtype)
    side = (None if kind == "none" else s, *(other[:2] if kind == "projected" else (None, None)))
    operands = (z, *bn[:2], *side, activation)
    y = simt.ops.block_end(*operands)
    eager = reference.block_end(*(v.to(dtype) if isinstance(v, Tensor) else v for v in operands))
    assert_as_exact_as_pytorch(y, eager, reference.block_end(*widened(operands)))
    assert y.is_contiguous(memory_format=LAST)


@pytest.mark.variants
@cover(dtype=DTYPES, shape=SHAPES, shortcut=[True, False], activation=list(Activation))
def test_block_end_backward(simt, dtype, shape, shortcut, activation):
    dy, z, s = (coarse(*shape, dtype=dtype) for _ in range(3))
    y = coarse(*shape, dtype=dtype) if activation else None
    mean, side = affine(shape[1], dtype).mean, affine(shape[1], dtype).mean
    last = (s, side) if shortcut else (None, None)
    g, sum_g, sum_g_xc, sum_g_side = simt.ops.block_end_backward(
        dy, y, z, mean, *last, True, activation
    )
    expected = dy
    if y is None:
        assert g.numel() == 0
    else:
        expected = gradient(dy, y, activation)
        assert torch.equal(g, expected)
        assert g.is_contiguous(memory_format=LAST)
    wide = expected.double()
    assert_sum(sum_g, wide)
    assert_sum(sum_g_xc, wide * (z.double() - per_channel(mean.double())))
    if shortcut:
        assert_sum(sum_g_side, wide * (s.double() - per_channel(side.double())))
    else:
        assert sum_g_side.numel() == 0
    alone = simt.ops.block_end_backward(dy, y, z, mean, *last, False, activation)
    assert torch.equal(alone[0], g)
    assert [t.numel() for t in alone[1:]] == [0, 0, 0]


def test_a_pass_for_each_sum(simt):
    """The projection's sum is a second launch; nothing is launched for what is not wanted."""
    z, mean = normal(2, 16, 4, 4, dtype=torch.float16), torch.zeros(16)

    def kernels(*arguments: object) -> list[str]:
        simt.launches()
        simt.ops.block_end_backward(*arguments)
        return [launch.kernel for launch in simt.launches()]

    reduce, finish = "bn_backward_reduce_kernel", "bn_backward_finish_kernel"
    for arguments, expected in (
        ((z, z, z, mean, None, None, True, 1), [reduce, finish]),
        ((z, z, z, mean, z, mean, True, 1), [reduce, finish] * 2),
        ((z, z, z, mean, z, mean, False, 1), [reduce]),
        ((z, None, z, mean, None, None, False, 0), []),
    ):
        found = kernels(*arguments)
        assert len(found) == len(expected)
        assert all(name in kernel for name, kernel in zip(expected, found, strict=True))


def test_sums_that_cancel_keep_their_digits(simt):
    """Each thread adds many terms that are far larger than their sum."""
    dy = normal(2, 4, 60, 60, dtype=torch.float32)
    dy += 100.0 * dy.sign()
    dy -= dy.mean((0, 2, 3), keepdim=True)
    zero = torch.zeros(4)
    _, sum_g, _, _ = simt.ops.block_end_backward(dy, None, dy, zero, None, None, True, 0)
    truth = channel_sum(dy)
    assert (truth.abs() < 1e-7 * channel_sum(dy.abs())).all()
    torch.testing.assert_close(sum_g.double(), truth, rtol=1e-6, atol=1e-8)


def test_nan_passes_a_block_end(simt):
    """As through PyTorch's ReLU, and its gradient behind it."""
    z, dy = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    z[1, 2, 3, 3] = float("nan")
    one, zero = torch.ones(3), torch.zeros(3)
    y = simt.ops.block_end(z, one, zero, None, None, None, True)
    assert y.isnan().sum() == 1
    g = simt.ops.block_end_backward(dy, y, z, zero, None, None, True)[0]
    assert g.sum() == 1
    assert g[1, 2, 3, 3] == 1


@pytest.mark.variants
@pytest.mark.parametrize("affine_bn", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("channels", [1, 300])
def test_coefficients(simt, affine_bn, channels):
    """Arithmetic is float64, rounded once; no values count as one."""
    mean, bias, g, g_xc = normal(4, channels, dtype=torch.float32)
    var = normal(channels, dtype=torch.float32).square()
    weight = None if affine_bn is None else normal(channels, dtype=affine_bn)
    bias = None if affine_bn is None else bias.to(affine_bn)
    eps = 1e-3
    for count in (21, 0):
        found = simt.ops.bn_coefficients(mean, var, weight, bias, eps)
        found += simt.ops.bn_backward_coefficients(g, g_xc, mean, var, weight, eps, count)
        forward, sums = widened((mean, var, weight, bias)), widened((g, g_xc, mean, var, weight))
        truth = reference.bn_coefficients(*forward, eps)
        truth += reference.bn_backward_coefficients(*sums, eps, count)
        for ours, exact in zip(found, truth, strict=True):
            assert ours.dtype is torch.float32
            torch.testing.assert_close(ours.double(), exact, rtol=1.2e-7, atol=1e-14)


@pytest.mark.variants
@cover(count=[0, 2, 50], step=[1, 2])
def test_running_statistics(simt, count, step):
    """Their version counters stay, and what lies between them."""
    mean, var = normal(37, dtype=torch.float32), normal(37, dtype=torch.float32).square()
    held = normal(2, 37 * step, dtype=torch.float32).abs()
    running = [t[::step] for t in held]
    before, beside = [t.double() for t in running], held[:, 1::2].clone()
    versions = [t._version for t in running]
    simt.ops.bn_update_running(mean, var, *running, 0.3, count)
    reference.bn_update_running(mean.double(), var.double(), *before, 0.3, count)
    for ours, exact in zip(running, before, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1.2e-7, atol=1e-14)
    assert [t._version for t in running] == versions
    if step == 2:
        assert torch.equal(held[:, 1::2], beside)


def test_wrong_arguments(simt):
    z, v, ops = torch.zeros(2, 16, 8, 8), torch.zeros(16), simt.ops
    wrong = [
        (lambda: ops.block_end(z[0], v, v, None, None, None, 1), "z: expected 4 dim"),
        (lambda: ops.block_end(z, v[1:], v, None, None, None, 1), r"scale: expected shape \[16"),
        (lambda: ops.block_end(z, v, v, z[:1], None, None, 1), "shortcut: expected shape"),
        (lambda: ops.block_end(z, v, v, z, v, None, 1), "expected both or neither"),
        (lambda: ops.block_end(z, v, v, None, v, v, 1), "shortcut: expected a tensor"),
        (lambda: ops.block_end_backward(z, z[1:], z, v, None, None, True), "y: expected shape"),
        (lambda: ops.block_end_backward(z, z, z, v, z, None, True), "expected both or neither"),
        (lambda: ops.bn_coefficients(v, v[1:], None, None, 1e-5), r"var: expected shape \[16\]"),
        (lambda: ops.bn_coefficients(z, v, None, None, 1e-5), "mean: expected 1 dimension"),
        (lambda: ops.bn_update_running(v, v, v.clone(), v.clone(), 0.1, 1), "more than 1 value"),
        (lambda: ops.bn_update_running(v, v, v.clone(), v.clone(), 0.1, -1), "count: expected"),
        (lambda: ops.bn_backward_coefficients(v, v, v, v, None, 1.0, -1), "count: expected"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="scale: expected dtype float32"):
        ops.block_end(z, v.half(), v, None, None, None, 1)
    with pytest.raises(TypeError, match="running_mean: expected dtype float32"):
        ops.bn_update_running(v, v, v.half(), v.clone(), 0.1, 4)
    with pytest.raises(TypeError, match="expected dtype float32, bfloat16 or float16"):
        ops.block_end(z.double(), v, v, None, None, None, 1)
