"""Residual blocks in training from which no gradient is wanted: frozen norms and parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import assert_same, image, results
from operator_calls import OperatorCalls
from tolerances import error
from torch import Tensor, nn
from training_blocks import X, basic, bottleneck

import fused_resnet as fr

CHANNELS_LAST = torch.channels_last


def frozen_norms(model: nn.Module) -> nn.Module:
    """In training, with all parameters and batch norms frozen."""
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def leaky(block: nn.Module) -> nn.Module:
    block.relu = nn.LeakyReLU(inplace=True)
    return block


def with_geometry(block: nn.Module, conv: str, **settings: Any) -> nn.Module:
    for name, value in settings.items():
        setattr(getattr(block, conv), name, value)
    return block


WHOLE = {
    "basic": basic,
    "basic, projection": lambda: basic(2),
    "bottleneck": bottleneck,
    "bottleneck, projection": lambda: bottleneck(2),
    "dilated": lambda: bottleneck(dilation=2),
    "groups": lambda: bottleneck(groups=2, base_width=128),
    "leaky": lambda: leaky(basic()),
    "no affine": lambda: basic(norm=lambda k: nn.BatchNorm2d(k, affine=False)),
}
#: Geometries that the whole operation doesn't have: the stride on the first 1x1, dilation in a
#: basic block, and strides and paddings that are not square but leave the size as it is.
IN_PARTS = {
    "stride on the 1x1": lambda: with_geometry(
        with_geometry(bottleneck(2), "conv1", stride=(2, 2)), "conv2", stride=(1, 1)
    ),
    "dilated basic": lambda: with_geometry(basic(), "conv1", dilation=(2, 2), padding=(2, 2)),
    "dilated second": lambda: with_geometry(basic(), "conv2", dilation=(2, 2), padding=(2, 2)),
    "oblong": lambda: with_geometry(bottleneck(), "conv2", dilation=(1, 2), padding=(1, 2)),
}  # fmt: skip


def operators_of(model: nn.Module, x: Tensor) -> list[str]:
    with OperatorCalls(lambda name: name.startswith("fused_resnet::")) as calls:
        model(x)
    kinds = ("residual_block", "conv_bn_add_relu", "training_unit")
    return [name for name, _ in calls.counts("fused_resnet::").items() if name in kinds]


@pytest.mark.parametrize("name", [*WHOLE, *IN_PARTS])
def test_result_is_the_unfused_block_s(name) -> None:
    block = frozen_norms((WHOLE | IN_PARTS)[name]())
    fused = fr.fuse(copy.deepcopy(block))
    x = image(*X).contiguous(memory_format=CHANNELS_LAST)
    got, expected = fused(x), block(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got.stride() == expected.contiguous(memory_format=CHANNELS_LAST).stride()
    assert operators_of(fused, x) == ["residual_block" if name in WHOLE else "conv_bn_add_relu"]


def wide(**settings: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A basic block that Winograd's algorithm pays for: in float64, and fused in float32."""
    block = frozen_norms(basic())
    for conv in (block.conv1, block.conv2):
        g = torch.Generator().manual_seed(5)
        conv.weight.data = torch.randn(64, 64, 3, 3, generator=g, dtype=torch.float64) / 24
    for norm in (block.bn1, block.bn2):
        for key in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, key).data = getattr(norm, key).data.repeat(8)
    fused = fr.fuse(copy.deepcopy(block).float(), **settings)
    x = image(4, 64, 28, 28, dtype=torch.float32).contiguous(memory_format=CHANNELS_LAST)
    return block, fused, x


def test_winograd_runs_in_training_alone_and_where_it_is_allowed() -> None:
    block, fused, x = wide()
    _, direct, _ = wide(winograd=False)
    truth = block(x.double())
    assert 1.5e-7 < error(fused(x), truth) < 3e-6
    assert error(direct(x), truth) < 1e-7
    fused.eval()
    assert error(fused(x), truth) < 1e-7


def test_a_parameter_that_learns_makes_it_a_training_unit() -> None:
    block = frozen_norms(bottleneck(2))
    block.conv2.weight.requires_grad_()
    fused = fr.fuse(copy.deepcopy(block))
    assert_same(results(fused, image(*X)), results(block, image(*X)))


def test_weights_and_statistics_are_read_at_every_call() -> None:
    block = frozen_norms(basic())
    fused = fr.fuse(copy.deepcopy(block))
    x = image(*X).contiguous(memory_format=CHANNELS_LAST)
    fused(x)
    for model in (block, fused):
        model.conv1.weight.data.mul_(-1)
        model.bn2.running_var.mul_(3)
        model.bn1.weight.data.add_(1)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-12, atol=1e-12)


def test_bfloat16_under_autocast() -> None:
    block, fused, x = wide()
    x = x.bfloat16()
    rounded = copy.deepcopy(block)
    for conv in (rounded.conv1, rounded.conv2):
        conv.weight.data = conv.weight.data.bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        got = fused(x)
    assert got.dtype is torch.bfloat16
    assert error(got, rounded(x.double())) < 3e-3


def test_hooks_run() -> None:
    block = frozen_norms(basic())
    fused = fr.fuse(copy.deepcopy(block))
    seen: list[Tensor] = []
    fused.bn1.register_forward_hook(lambda module, args, y: seen.append(y))
    x = image(*X).contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


def test_compiled_without_a_graph_break() -> None:
    torch._dynamo.reset()
    block = frozen_norms(nn.Sequential(basic(), bottleneck(2)))
    fused = fr.fuse(copy.deepcopy(block))
    x = image(*X).contiguous(memory_format=CHANNELS_LAST)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context", ["vmap", "trace", "export", "empty"])
def test_other_calls_take_the_groups(context) -> None:
    block = frozen_norms(basic())
    fused = fr.fuse(copy.deepcopy(block))
    x = image(*X).contiguous(memory_format=CHANNELS_LAST)
    if context == "vmap":
        expected = block(x)
        got = torch.func.vmap(fused)(x[:, None])[:, 0]
    elif context == "trace":
        expected, got = block(x), torch.jit.trace(fused, x, check_trace=False)(x)
    elif context == "export":
        program = torch.export.export(fused, (x,))
        assert "pack_conv_weight" not in str(program.graph)
        expected, got = block(x), program.module()(x)
    else:
        expected, got = block(x[:0]), fused(x[:0])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_report_lists_them() -> None:
    model = frozen_norms(nn.Sequential(basic().float(), basic().float()))
    model[1].conv1.register_forward_hook(lambda *_: None)
    blocks = fr.report(fr.fuse(model)).blocks
    assert blocks[0] == ("0", "")
    assert blocks[1][0] == "1"
    assert "hook" in blocks[1][1]
    assert fr.report(fr.fuse(model.eval())).blocks == []


def test_autocast_takes_no_float64_weight() -> None:
    """PyTorch's does not cast it either: an error in both."""
    block = frozen_norms(basic())
    x = image(*X, dtype=torch.bfloat16)
    for model in (block, fr.fuse(copy.deepcopy(block))):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises((RuntimeError, TypeError)):
            model(x)
