"""Errors name the operation, the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from cases import batch_norm
from operation_cases import (
    BACKENDS,
)

import fused_resnet as fr
from fused_resnet import _C, ops


def conv_arguments(**changes):
    bn = dict(
        zip(
            ("bn_weight", "bn_bias", "running_mean", "running_var"),
            batch_norm(6, torch.float32),
            strict=True,
        )
    )
    return {"x": torch.randn(2, 4, 5, 5), "conv_weight": torch.randn(6, 4, 3, 3), **bn, **changes}


BAD = [
    ({"x": torch.randn(4, 5, 5)}, ValueError, "x: expected 4 dimensions"),
    ({"x": torch.randn(2, 5, 5, 5)}, ValueError, "x: expected 4 channels"),
    ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "x: expected dtype"),
    ({"x": "image"}, TypeError, "x: expected a Tensor, got str"),
    ({"x": torch.randn(2, 4, 2, 5)}, ValueError, "x: expected a feature map at least as large"),
    ({"conv_weight": torch.randn(6, 4, 3)}, ValueError, "conv_weight: expected 4 dimensions"),
    ({"conv_weight": torch.randn(6, 4, 3, 3).double()}, TypeError, "conv_weight: expected dtype"),
    ({"conv_weight": torch.randn(6, 4, 3, 3, device="meta")}, ValueError, "expected device cpu"),
    ({"conv_bias": torch.randn(5)}, ValueError, r"conv_bias: expected shape \(6,\)"),
    ({"bn_weight": torch.randn(5)}, ValueError, r"bn_weight: expected shape \(6,\)"),
    ({"bn_bias": torch.randn(6).long()}, TypeError, "bn_bias: expected dtype"),
    ({"running_mean": torch.randn(6).half()}, TypeError, "running_mean: expected dtype"),
    ({"running_mean": None}, ValueError, "expected both or neither"),
    ({"running_mean": None, "running_var": None}, ValueError, "when training=False"),
    ({"residual": torch.randn(2, 6, 5, 5)}, ValueError, "residual: expected shape"),
    ({"residual": torch.randn(2, 6, 3, 3).bfloat16()}, TypeError, "residual: expected dtype"),
    ({"residual": torch.randn(2, 6, 3, 3, device="meta")}, ValueError, "residual: expected device"),
    ({"groups": 4}, ValueError, "groups: expected a divisor"),
    ({"groups": 0}, ValueError, "groups: expected a divisor"),
    ({"stride": 0}, ValueError, "stride: expected an int >= 1"),
    ({"stride": (1, 2, 3)}, ValueError, "stride"),
    ({"padding": -1}, ValueError, "padding: expected an int >= 0"),
    ({"dilation": "2"}, ValueError, "dilation"),
    (
        {"x": torch.randn(1, 4, 3, 3), "training": True},
        ValueError,
        "more than 1 value per channel when training",
    ),
    ({"training": True, "eps": 0.0}, ValueError, "eps: expected a positive number when training"),
    ({"training": True, "eps": float("nan")}, ValueError, "eps: expected a positive number"),
    ({"eps": -0.5}, ValueError, "eps: expected a number of at least 0"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_wrong_arguments_are_named(backend, changes, kind, message):
    with fr.use_backend(backend), pytest.raises(kind, match=message) as caught:
        ops.conv_bn_add_relu(**conv_arguments(**changes))
    assert "conv_bn_add_relu: " in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel_in_training_is_an_error(backend):
    bn = batch_norm(4, torch.float32)
    with fr.use_backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_add_relu(torch.randn(1, 4, 1, 1), *bn, training=True)


@pytest.mark.parametrize("train", [True, False])
def test_an_eps_of_zero_is_an_error_in_training_alone(train):
    """As in PyTorch; in whole blocks too, which run as one operation in training."""
    block = fr.fuse(fr.nn.BasicBlock(4, 4)).train(train)
    block.bn2.eps = 0.0
    x = torch.randn(2, 4, 5, 5)
    bn = batch_norm(4, torch.float32)
    if not train:
        assert block(x).isfinite().all()
        assert ops.bn_add_relu(x, *bn, eps=0.0).isfinite().all()
        return
    for call in (
        lambda: block(x),
        lambda: ops.bn_add_relu(x, *bn, training=True, eps=0.0),
        lambda: torch.nn.functional.batch_norm(x, *bn[2:], *bn[:2], training=True, eps=0.0),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"eps.* positive"):
            call()


@pytest.mark.parametrize("grad", [True, False])
def test_a_negative_eps_is_an_error_in_a_block_too(grad):
    block = fr.fuse(fr.nn.BasicBlock(4, 4)).eval().requires_grad_(grad)
    block.bn2.eps = -0.5
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    for mode in (False, True):  # a frozen backbone is in training mode with its norms in eval
        block.train(mode)
        block.bn1.eval(), block.bn2.eval()
        with pytest.raises(ValueError, match=r"eps.* at least 0"):
            block(x)


def test_wrong_pool_arguments_are_named():
    arguments = conv_arguments(padding=1)
    with pytest.raises(ValueError, match="pool_padding: expected at most half"):
        ops.conv_bn_relu_maxpool(**arguments, pool_kernel=2, pool_padding=2)
    with pytest.raises(ValueError, match="pool_kernel: expected at most the padded map"):
        ops.conv_bn_relu_maxpool(**arguments, pool_kernel=9, pool_padding=0)


def test_compiled_operators_have_checks_of_their_own():
    """``torch.ops`` and ``_C`` bypass the Python checks."""
    x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    one, geometry = torch.ones(6), ([1, 1], [0, 0], [1, 1], 1)
    short = torch.ones(5)
    bad_calls = [
        lambda: _C.conv_bn_add_relu(
            x, w, None, None, None, short, one, None, *geometry, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu(
            x[0], w, None, None, None, one, one, None, *geometry, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu(x, w, None, None, None, one, one, x, *geometry, 1e-5, True),
        lambda: _C.conv_bn_add_relu(
            x, w, None, None, None, one, one, None, [0, 1], [0, 0], [1, 1], 1, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu_packed(x, one, one, one, None, [6, 4, 3, 3], *geometry, True),
        lambda: _C.unpack_conv_weight(one, [6, 4, 3, 3], 1),
        lambda: _C.bn_add_relu(x, one, None, None, None, None, True, 1e-5, True),
        lambda: _C.bn_add_relu(x, None, None, None, None, None, False, 1e-5, True),
        lambda: _C.bn_add_relu_backward(
            x, x, None, None, one[:4], one[:4], True, 1e-5, True, False
        ),
        lambda: _C.conv_bn_relu_maxpool(
            x, w, None, None, None, one, one, *geometry, 1e-5, [2, 2], [1, 1], [2, 2]
        ),
    ]
    for call in bad_calls:
        with pytest.raises((ValueError, TypeError)):
            call()
