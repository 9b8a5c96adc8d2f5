"""What converters, tracers and monkey patches of other code make of fused modules."""

from __future__ import annotations

import gc
import linecache
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9)


def test_converters_of_batch_norms_leave_bn_add_relu_alone():
    """They would drop its ReLU; nn.BatchNorm2d's keys are kept, so checkpoints load."""
    module = fr.nn.BNAddReLU2d(8)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(module))
    assert converted[0] is module
    assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.state_dict().keys() == nn.BatchNorm2d(8).state_dict().keys()
    module.load_state_dict(nn.BatchNorm2d(8).state_dict())
    assert converted(torch.randn(2, 8, 3, 3)).min() >= 0


def test_sync_batch_norm_inside_a_conv_module_keeps_its_relu(x):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fr.nn.ConvBNReLU2d(3, 8, 3)).eval()
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    assert converted(x).min() >= 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_fx_traces_through_the_modules(x, mode):
    """They are no leaves for torch.fx, so what it records must be PyTorch's own calls."""
    model = nn.Sequential(fr.nn.ConvBNReLU2d(3, 8, 3), fr.nn.BNAddReLU2d(8)).double()
    getattr(model, mode)()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x.double()), model(x.double()), rtol=1e-9, atol=1e-9)


def circular(self, input, weight, bias):
    padded = F.pad(input, (1, 1, 1, 1), mode="circular")
    return F.conv2d(padded, weight, bias, self.stride)


def test_a_method_replaced_on_an_instance_runs(x):
    model = sequence().eval()
    model[0]._conv_forward = circular.__get__(model[0])
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    assert fused(x).shape[-1] == 9
    assert fr.report(fused).left


def test_a_method_replaced_after_fusing_runs(x):
    fused = fr.fuse(sequence().eval())
    fused[0]._conv_forward = circular.__get__(fused[0])
    assert fused(x).shape[-1] == 9


@pytest.mark.parametrize(
    ("cls", "name", "method"),
    [
        (nn.Conv2d, "_conv_forward", circular),
        (nn.BatchNorm2d, "forward", lambda self, x: x * 2),
        (nn.ReLU, "forward", lambda self, x: x + 100),
    ],
)
def test_a_method_replaced_on_the_class_runs(x, monkeypatch, cls, name, method):
    model = sequence().eval()
    fused = fr.fuse(model)
    monkeypatch.setattr(cls, name, method)
    torch.testing.assert_close(fused(x), model(x))


def test_classes_that_fuse_derives_are_not_kept():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = sequence()
            self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(self.body(x))).relu()

    before = len(linecache.cache)
    fused = fr.fuse(Block())
    assert fr.report(fused).fused
    kept = weakref.ref(type(fused))
    del fused, Block
    gc.collect()
    assert kept() is None
    assert len(linecache.cache) <= before


def test_jit_trace_with_gradients_agrees_with_its_own_check(x):
    """The check runs without gradients, where another operation might be chosen."""
    stem = nn.Sequential(*sequence(), nn.MaxPool2d(3, 2, 1))
    torch.jit.trace(fr.fuse(stem.eval()), x)


def test_meta_tensors(x):
    """They are never timed: the tuner has no shipped timings for their device either."""
    model = fr.fuse(sequence().eval()).to("meta")
    assert model(x.to("meta")).shape == (2, 8, 7, 7)
