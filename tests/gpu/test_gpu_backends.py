"""The other backends that run on a GPU: the same functions, a few shapes of each kind.

Judged as ``fused-resnet verify`` judges: within 1.5 times PyTorch's own error, or rounding.
"""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, Conv
from on_gpu import bn_operands, conv_operands, exact, there, unfused
from tolerances import RATIO, error

import fused_resnet as fr
from fused_resnet import ops

backends = pytest.mark.parametrize("backend", ["triton", "library"])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"]
)
FEW = [CONVS[i] for i in (0, 4, 9, 11)]  # Triton compiles for each
STEM = Conv("stem", (2, 3, 64, 64), 64, (7, 7), {"stride": 2, "padding": 3})


def check(backend, operation, operands, **options):
    status = fr.backends()[backend]
    if not status:
        pytest.skip(f"no {backend} backend: {status.reason}")
    truth_operands, operands = exact(operands), there(operands)
    own = {name: t.clone() for name, t in operands.items()}
    with fr.use_backend(backend):
        result = getattr(ops, operation)(**own, **options)
    eager = unfused(operation, operands, **options)
    truth = unfused(operation, truth_operands, **options)
    assert result.dtype is eager.dtype
    assert result.stride() == eager.stride()
    bound = max(RATIO * error(eager.cpu(), truth), 2 * torch.finfo(result.dtype).eps)
    assert error(result.cpu(), truth) <= bound
    for name in ("running_mean", "running_var"):
        assert error(own[name].cpu(), truth_operands[name]) < 1e-3


@backends
@dtypes
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 7, 7), (2, 37, 5, 3), (2, 20, 41, 41)], ids=str)
def test_bn_add_relu(backend, dtype, training, shape):
    operands = bn_operands(shape, dtype, "channels_last", residual=True)
    check(backend, "bn_add_relu", operands, training=training)


@backends
@dtypes
@pytest.mark.parametrize("case", FEW, ids=str)
def test_conv_bn_add_relu(backend, dtype, case):
    operands = conv_operands(case, dtype, "channels_last", residual=True)
    check(backend, "conv_bn_add_relu", operands, **case.args)


@backends
@dtypes
def test_conv_bn_relu_maxpool(backend, dtype):
    operands = conv_operands(STEM, dtype, "channels_last", residual=False)
    check(backend, "conv_bn_relu_maxpool", operands, **STEM.args)
