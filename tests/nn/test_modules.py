"""fused_resnet.nn against modules of PyTorch and torchvision that share its parameters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from networks import assert_same, image, randomize, results
from tolerances import assert_as_exact_as_pytorch
from torch import Tensor, nn

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's blocks are the truth here")
from torchvision.models import resnet as tv_resnet  # noqa: E402

# Each setting of nn.BatchNorm2d or nn.Conv2d that differs from its default.
SETTINGS = {
    "1x1": dict(kernel_size=1),
    "3x3 stride 2": dict(kernel_size=3, stride=2, padding=1),
    "asymmetric": dict(kernel_size=(1, 3), stride=(2, 1), padding=(0, 1)),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "grouped": dict(kernel_size=3, padding=1, groups=3),
    "conv bias": dict(kernel_size=3, bias=True),
    "padding same": dict(kernel_size=3, padding="same", dilation=2),
    "padding valid": dict(kernel_size=3, padding="valid"),
    "padding same, even kernel": dict(kernel_size=2, padding="same"),
    "eps 1e-3": dict(kernel_size=1, eps=1e-3),
    "momentum None": dict(kernel_size=1, momentum=None),
    "momentum 0.7": dict(kernel_size=1, momentum=0.7),
    "no affine": dict(kernel_size=1, affine=False),
    "no statistics": dict(kernel_size=1, track_running_stats=False),
}


class Unfused(nn.Module):
    """The same children, called one by one."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(conv), copy.deepcopy(bn)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", SETTINGS)
def test_conv_modules_equal_their_children(name: str, training: bool) -> None:
    settings = SETTINGS[name] | {"dtype": torch.float64}
    x = image(2, 6, 9, 8)
    plain = randomize(fr.nn.ConvBNReLU2d(6, 9, **settings)).train(training)
    add = randomize(fr.nn.ConvBNAddReLU2d(6, 9, **settings)).train(training)
    for module in (plain, add):
        other = Unfused(module.conv, module.bn).train(training)
        inputs = (x,) if module is plain else (x, image(*module.conv(x).shape, seed=5))
        for _ in range(2):  # the second call sees the statistics that the first one left
            assert_same(results(module, *inputs), results(other, *inputs), 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no residual"])
def test_bn_add_relu_module(training: bool, with_residual: bool) -> None:
    module = randomize(fr.nn.BNAddReLU2d(7, dtype=torch.float64)).train(training)
    plain = nn.BatchNorm2d(7, dtype=torch.float64).train(training)
    plain.load_state_dict(module.state_dict())
    other = Unfused(nn.Identity(), plain).train(training)
    inputs = (image(3, 7, 5, 4), image(3, 7, 5, 4, seed=5))[: 1 + with_residual]
    expected = {k.replace("bn.", ""): v for k, v in results(other, *inputs).items()}
    assert_same(results(module, *inputs), expected, 1e-12)
    assert isinstance(module, nn.BatchNorm2d)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_stem(training: bool) -> None:
    stem = randomize(fr.nn.Stem(3, 10).double()).train(training)
    plain = nn.Sequential(
        nn.Conv2d(3, 10, 7, 2, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ).double()
    plain.load_state_dict(
        {k.replace("conv.", "0.").replace("bn.", "1."): v for k, v in stem.state_dict().items()}
    )
    expected = {
        k.replace("0.", "conv.").replace("1.", "bn."): v
        for k, v in results(plain.train(training), image(2, 3, 21, 18)).items()
    }
    assert_same(results(stem, image(2, 3, 21, 18)), expected, 1e-12)
    with torch.no_grad():  # the kernel that never stores the large map
        torch.testing.assert_close(
            stem.eval()(image(2, 3, 21, 18)), plain.eval()(image(2, 3, 21, 18))
        )


BLOCKS = {
    "basic": ("BasicBlock", dict(inplanes=8, planes=8)),
    "basic, downsample": ("BasicBlock", dict(inplanes=8, planes=12, stride=2)),
    "bottleneck": ("Bottleneck", dict(inplanes=16, planes=4)),
    "bottleneck, downsample": ("Bottleneck", dict(inplanes=8, planes=4, stride=2)),
    "bottleneck, grouped": ("Bottleneck", dict(inplanes=64, planes=16, groups=2, base_width=32)),
    "bottleneck, dilated": ("Bottleneck", dict(inplanes=16, planes=4, dilation=2)),
}


def build(package: object, name: str) -> nn.Module:
    """The block from one package; the same seed gives the same parameters from both."""
    torch.manual_seed(7)
    kind, settings = BLOCKS[name]
    cls = getattr(package, kind)
    width = settings["planes"] * cls.expansion
    downsample = None
    if settings["inplanes"] != width:
        conv = nn.Conv2d(settings["inplanes"], width, 1, settings["stride"], bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(width))
    return randomize(cls(downsample=downsample, **settings))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_torchvisions(name: str, training: bool) -> None:
    ours, theirs = build(fr.nn, name).train(training), build(tv_resnet, name).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    x = image(2, BLOCKS[name][1]["inplanes"], 9, 7)
    ours.double(), theirs.double()
    for _ in range(2):
        assert_same(results(ours, x), results(theirs, x), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_as_exact_as_pytorch(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = image(2, BLOCKS[name][1]["inplanes"], 14, 13, dtype=dtype).to(memory_format=layout)
    ours = fr.fuse(build(fr.nn, name).to(dtype)).eval()
    theirs = build(tv_resnet, name).to(dtype).eval()
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        y = ours(x)
        assert_as_exact_as_pytorch(y, theirs(x), truth(x.double()))
    assert y.is_contiguous(memory_format=layout)


def test_channel_count_is_checked() -> None:
    with pytest.raises(ValueError, match=r"conv_bn_add_relu: x: expected 4 channels.*got 5"):
        fr.nn.ConvBNReLU2d(4, 8, 3)(torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match="groups: expected 1, got 2"):
        fr.nn.BasicBlock(8, 8, groups=2)
    with pytest.raises(ValueError, match="dilation: expected 1, got 2"):
        fr.nn.BasicBlock(8, 8, dilation=2)


def test_one_value_per_channel_is_an_error_in_training_only() -> None:
    module = randomize(fr.nn.ConvBNReLU2d(4, 8, 3))
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x)
    other = Unfused(module.conv, module.bn).eval()
    torch.testing.assert_close(module.eval()(x), other(x))


@pytest.mark.parametrize(
    "shape", [(2, 8, 1, 1), (2, 8, 1, 6), (2, 8, 6, 1), (1, 8, 6, 6), (2, 1, 6, 6)]
)
def test_residual_that_pytorch_would_broadcast_still_broadcasts(shape: tuple[int, ...]) -> None:
    module = randomize(fr.nn.ConvBNAddReLU2d(4, 8, 3, padding=1)).eval()
    other = Unfused(module.conv, module.bn).eval()
    x, residual = image(2, 4, 6, 6, dtype=torch.float32), image(*shape, dtype=torch.float32)
    torch.testing.assert_close(module(x, residual), other(x, residual))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_propagate_as_in_pytorch(bad: float) -> None:
    x = image(1, 16, 8, 8, dtype=torch.float32)
    x[0, 3, 4, 4] = bad
    ours, theirs = build(fr.nn, "bottleneck").eval(), build(tv_resnet, "bottleneck").eval()
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_empty_batch() -> None:
    ours = build(fr.nn, "bottleneck").eval()
    assert ours(torch.zeros(0, 16, 8, 8)).shape == (0, 16, 8, 8)


def test_autocast_follows_pytorch() -> None:
    ours, theirs = build(fr.nn, "bottleneck"), build(tv_resnet, "bottleneck")
    truth = copy.deepcopy(theirs).double()
    x = image(4, 16, 10, 10, dtype=torch.float32)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = ours.train(training)(x), theirs.train(training)(x)
        assert y.dtype is expected.dtype
        reference = truth.train(training)(x.double())
        assert (y.double() - reference).norm() <= 1.5 * (expected.double() - reference).norm()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=2e-2, atol=2e-2, msg=key)
        assert ours.state_dict()[key].dtype is value.dtype


def test_frozen_batch_norm_inside_a_training_block() -> None:
    ours, theirs = build(fr.nn, "basic").double(), build(tv_resnet, "basic").double()
    for block in (ours, theirs):
        block.train().bn1.eval()
        block.bn2.requires_grad_(False)
    before = ours.bn1.running_mean.clone()
    assert_same(results(ours, image(2, 8, 6, 6)), results(theirs, image(2, 8, 6, 6)), 1e-12)
    assert torch.equal(ours.bn1.running_mean, before)


def test_a_module_used_twice_sums_its_gradients_and_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    ours = Twice(build(fr.nn, "bottleneck").double())
    theirs = Twice(build(tv_resnet, "bottleneck").double())
    x = image(2, 16, 6, 6)
    assert_same(results(ours, x), results(theirs, x), 1e-11)
    assert ours.block.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_blocks_compile_in_one_graph(training: bool) -> None:
    block = build(fr.nn, "bottleneck, downsample").double().train(training)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = image(2, 8, 8, 8)
    assert_same(
        {k.replace("_orig_mod.", ""): v for k, v in results(compiled, x).items()},
        results(eager, x),
        1e-12,
    )


def test_modules_copy_and_pickle() -> None:
    block = build(fr.nn, "basic, downsample").eval()
    x = image(1, 8, 6, 6, dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(block), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), block(x))
        assert other.conv1.weight is not block.conv1.weight
