"""Operations on packed weights and folded batch norms."""

from __future__ import annotations

import pytest
import torch
from cases import batch_norm, conv_weight, doubled, normal
from operation_cases import (
    STEMS,
    convs,
    dtypes,
)

from fused_resnet import ops


@convs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_is_lossless(case, dtype):
    w, groups = conv_weight(case, dtype), case.args.get("groups", 1)
    packed = ops.pack_conv_weight(w, groups)
    assert torch.equal(ops.unpack_conv_weight(packed, tuple(w.shape), groups), w)


@dtypes
@convs
def test_packed_agrees_with_live_parameters(case, dtype):
    """The same kernels run, with scale and shift folded here: equal up to their rounding."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = conv_weight(case, dtype), batch_norm(case.k, dtype)
    live = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    packed = ops.conv_bn_add_relu_packed(
        x,
        ops.pack_conv_weight(w, case.args.get("groups", 1)),
        scale.to(wide),
        (bias - mean * scale).to(wide),
        weight_shape=tuple(w.shape),
        **case.args,
    )
    rtol = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps * 2)
    torch.testing.assert_close(packed, live, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("dilation", [1, 2])
def test_groups_that_share_a_vector_are_independent(channels, dilation):
    """Not even a NaN passes from one group to its neighbour in a vector."""
    x = normal(1, 64, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    w = normal(64, channels, 3, 3, dtype=torch.float32)
    geometry = {"padding": dilation, "dilation": dilation, "groups": 64 // channels}
    x[:, 2 * channels + 1] = torch.nan
    y = ops.conv_bn_add_relu(x, w, *batch_norm(64, torch.float32), relu=False, **geometry)
    inside = torch.arange(64) // channels == 2
    assert y[:, inside].isnan().all()
    assert not y[:, ~inside].isnan().any()


@pytest.mark.parametrize("case", STEMS, ids=str)
def test_packed_stem_agrees_with_live_parameters(case):
    x = normal(*case.x, dtype=torch.float32)
    w, bn = conv_weight(case, torch.float32), batch_norm(case.k, torch.float32)
    live = ops.conv_bn_relu_maxpool(x, w, *bn, **case.args)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    packed = ops.conv_bn_relu_maxpool_packed(
        x,
        ops.pack_conv_weight(w),
        scale.float(),
        (bias - mean * scale).float(),
        weight_shape=tuple(w.shape),
        **case.args,
    )
    torch.testing.assert_close(packed, live, rtol=1e-5, atol=1e-5)
