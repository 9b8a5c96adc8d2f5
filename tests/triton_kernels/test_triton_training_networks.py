"""Blocks and whole ResNets trained by Triton's primitives, in the hardened interpreter."""

from __future__ import annotations

import pytest
import torch
from networks import image, randomize
from torch import nn
from trained_models import assert_trained_as_exactly

import fused_resnet as fr
from fused_resnet.nn import BasicBlock, Bottleneck

HALVES = [torch.bfloat16, torch.float16]
slow = pytest.mark.slow


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_a_block(make, stride):
    """Both halves take turns; identity and projection; no kernel of PyTorch's between them."""
    torch.manual_seed(0)
    width = 16 * make.expansion
    side = None
    if stride == 2:
        conv = nn.Conv2d(width, 2 * width, 1, 2, bias=False)
        side = nn.Sequential(conv, nn.BatchNorm2d(2 * width))
    block = make(width, 16 * stride, stride, side)
    dtype = HALVES[stride - 1]
    x = image(2, width, 9, 7, dtype=dtype)
    kernels = assert_trained_as_exactly("triton", randomize(block), x, dtype)
    convs = sum(isinstance(module, nn.Conv2d) for module in block.modules())
    assert kernels.count("conv_data_gradient_kernel") == convs
    assert kernels.count("conv_weight_gradient_kernel") == convs
    # Batch norm's numbers: none beside the kernel that finishes the statistics, one in backward.
    assert kernels.count("conv_statistics_kernel") == convs
    assert kernels.count("bn_coefficients_kernel") == 0
    assert kernels.count("bn_update_running_kernel") == 0
    assert kernels.count("bn_backward_coefficients_kernel") == convs
    assert kernels.count("block_end_kernel") == 1
    assert kernels.count("block_end_backward_kernel") == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("resnet18", torch.bfloat16, id="resnet18-bfloat16", marks=slow),
        pytest.param("resnet18", torch.float16, id="resnet18-float16", marks=slow),
        pytest.param("resnet50", torch.bfloat16, id="resnet50-bfloat16", marks=slow),
        pytest.param("resnet50", torch.float16, id="resnet50-float16", marks=slow),
    ],
)
def test_a_network(name, dtype):
    torch.manual_seed(0)
    model = randomize(getattr(fr, name)(num_classes=10))
    x = image(2, 3, 64, 64, dtype=torch.float32)
    kernels = assert_trained_as_exactly("triton", model, x, dtype)
    convs = 20 if name == "resnet18" else 53
    assert kernels.count("conv_bn_add_relu_kernel") == convs
    # The stem's weight has three channels: its gradient is PyTorch's, between passes.
    assert kernels.count("conv_weight_gradient_kernel") == convs - 1
    assert kernels.count("conv_data_gradient_kernel") == convs - 1
    assert kernels.count("stem_end_kernel") == kernels.count("stem_end_backward_kernel") == 1
