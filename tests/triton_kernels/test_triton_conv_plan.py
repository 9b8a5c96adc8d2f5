"""What the host decides before a launch of the convolution: which kernels are compiled."""

from __future__ import annotations

from typing import Any

import pytest
from ahead_of_time import full, recorded
from precisions import BFLOAT16

from fused_resnet.backends import triton as kernels
from fused_resnet.backends.triton._conv_plan import CONFIGS


def constants(c: int, kernel: int, groups: int = 1) -> dict[str, Any]:
    """The compile-time arguments of a convolution of ``c`` channels, on an H100."""
    dtype, pair = BFLOAT16.dtype, (kernel // 2, kernel // 2)
    x, w = full(256, c, 28, 28, dtype=dtype), full(256, c // groups, kernel, kernel, dtype=dtype)
    v, ones = full(256), (1, 1)
    config = next(tile for tile in CONFIGS["half"] if tile[:3] == (64, 64, 64))
    (launch,) = recorded(
        lambda: kernels.conv_bn_add_relu(
            x, w, None, v, v, v, v, None, ones, pair, ones, groups, 1e-5, 1, config=config
        ),
        90,
    )
    names = {p.name for p in launch.kernel.params if p.is_constexpr}
    return {name: launch.arguments[name] for name in names}


@pytest.mark.parametrize("c", [128, 192, 512, 2048])
def test_convolutions_of_one_tap_share_a_kernel(c: int) -> None:
    """They divide by nothing, so another number of channels compiles nothing."""
    assert constants(c, 1) == constants(64, 1)


def test_each_width_of_a_3x3_has_a_kernel() -> None:
    found = {c: constants(c, 3) for c in (64, 128, 256, 512)}
    assert [f["TAP_C"] for f in found.values()] == [64, 128, 256, 512]
    assert all(f | {"TAP_C": 64} == found[64] for f in found.values())
    assert found[64]["KH"] == found[64]["KW"] == 3


def test_the_width_is_that_of_a_group() -> None:
    assert constants(512, 3, groups=8)["TAP_C"] == 64
