"""Residual blocks in training: fused against unfused in float64, whatever they are made of."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import assert_same, image, randomize, results
from torch import nn

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from torchvision.models.resnet import Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d
from training_blocks import (
    X,
    assert_one_unit,
    assert_trains_the_same,
    basic,
    bottleneck,
    pair,
    projection,
)

import fused_resnet as fr
from fused_resnet.ops import training_unit

NORMS = {
    "plain": nn.BatchNorm2d,
    "eps and momentum": functools.partial(nn.BatchNorm2d, eps=1e-2, momentum=0.3),
    "cumulative average": functools.partial(nn.BatchNorm2d, momentum=None),
    "no affine": functools.partial(nn.BatchNorm2d, affine=False),
    "no statistics": functools.partial(nn.BatchNorm2d, track_running_stats=False),
    "frozen class": FrozenBatchNorm2d,
}


@pytest.fixture
def units(monkeypatch) -> list:
    """The units that ran by the primitives."""
    ran = []
    original = training_unit._TrainingUnit.apply

    def apply(unit, *arguments):
        ran.append(unit)
        return original(unit, *arguments)

    monkeypatch.setattr(training_unit._TrainingUnit, "apply", apply)
    return ran


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stride", [1, 2], ids=["identity", "projection"])
@pytest.mark.parametrize("make", [basic, bottleneck])
def test_blocks_of_torchvision(make, stride, norm, units) -> None:
    fused = assert_trains_the_same(make(stride, NORMS[norm]))
    assert len(units) == 2, "each of two calls is one unit"
    if norm != "frozen class":
        assert_one_unit(fused)


GEOMETRIES = {
    "groups": dict(groups=2, base_width=64),
    "dilation": dict(dilation=2),
    "wide": dict(base_width=128),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("stride", [1, 2])
def test_geometries_of_the_bottleneck(geometry, stride, units) -> None:
    assert_trains_the_same(bottleneck(stride, **GEOMETRIES[geometry]))
    assert len(units) == 2


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [basic, bottleneck])
def test_the_memory_format_is_kept(make, memory_format) -> None:
    eager, fused = pair(make())
    x = image(*X).contiguous(memory_format=memory_format)
    assert fused(x).stride() == eager(x).stride()
    results(fused.to(memory_format=memory_format), x)
    for name, p in fused.named_parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride(), name


def first_stage() -> nn.Module:
    """The projection has as few terms as the last convolution."""
    torch.manual_seed(0)
    block = Bottleneck(8, 8, 1, projection(8, 32, 1))
    return randomize(block).double().train()


#: Blocks, and the elements of the results that are computed again.
RECOMPUTED = {
    "identity": (bottleneck, 3 * 8 * 9 * 7),
    "projection": (functools.partial(bottleneck, 2), 3 * 16 * 5 * 4),
    "cheap projection": (first_stage, 2 * 3 * 32 * 9 * 7),
}


@pytest.mark.parametrize("block", RECOMPUTED)
def test_recomputing_gives_the_same_bits_and_keeps_less(block) -> None:
    make, fewer = RECOMPUTED[block]
    kept = []
    found = []
    x = image(*X)
    for recompute in (False, True):
        model = fr.fuse(make(), recompute=recompute)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(x)
        kept.append(sum(sizes))
        found.append(results(model, x))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert kept[0] - kept[1] == fewer
    assert_trains_the_same(make(), recompute=True)


@pytest.mark.parametrize("frozen", [("bn1",), ("bn2",), ("bn1", "bn2", "downsample.1")], ids=str)
def test_norms_in_eval_mode_inside_of_a_training_block(frozen, units) -> None:
    block = basic(2)
    for name in frozen:
        block.get_submodule(name).eval()
    eager, fused = pair(block)
    for _ in range(2):
        assert_same(results(fused, image(*X)), results(eager, image(*X)))
    assert len(units) == 2


SELECTIONS = {
    "the last convolution": ["conv3.weight"],
    "the first norm": ["bn1.bias"],
    "the shortcut": ["downsample.0.weight", "downsample.1.weight"],
    "one weight of a norm": ["bn2.weight"],
    "nothing": [],
}


@pytest.mark.parametrize("wanted", SELECTIONS)
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_only_what_is_wanted_gets_a_gradient(wanted, input_grad, training) -> None:
    eager, fused = pair(bottleneck(2).train(training))
    outcomes = []
    for model in (eager, fused):
        for name, p in model.named_parameters():
            p.requires_grad_(name in SELECTIONS[wanted])
        x = image(*X).requires_grad_(input_grad)
        y = model(x)
        assert y.requires_grad is (input_grad or bool(SELECTIONS[wanted]))
        if y.requires_grad:
            (y * image(*y.shape, seed=3)).sum().backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        outcomes.append(grads | {"y": y.detach()} | ({"x": x.grad} if input_grad else {}))
    assert outcomes[0].keys() == outcomes[1].keys()
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_networks_of_cifar(residual, shortcut, units) -> None:
    torch.manual_seed(0)
    model = randomize(fr.cifar_resnet(20, residual, shortcut)).double().train()
    twin = copy.deepcopy(model)
    x = image(2, 3, 12, 12)
    found = results(model, x)
    assert len(units) == 9 + 1, "nine blocks and the first convolution"
    with fr.use_backend("reference"):
        expected = results(twin, x)
    assert len(units) == 10
    assert_same(found, expected)
    assert_one_unit(model, 9)


@pytest.mark.parametrize("backend", ["cpu", "library"])
def test_every_backend_with_the_primitives(backend, units) -> None:
    eager, fused = pair(nn.Sequential(basic(), bottleneck(2)).train())
    x = image(*X)
    with fr.use_backend(backend):
        found = results(fused, x)
    assert [unit.backend for unit in units] == [backend] * 2
    assert_same(found, results(eager, x))


def test_an_own_block_is_traced_and_runs_whole(units) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = projection(8, 8, 1)
            self.second = projection(8, 8, 1)

        def forward(self, x):
            return torch.relu(x + self.second(torch.relu(self.first(x))))

    torch.manual_seed(0)
    fused = assert_trains_the_same(randomize(Block()).double().train())
    assert len(units) == 2
    assert_one_unit(fused)


@pytest.mark.parametrize(
    "shortcut", [nn.Sequential(), nn.Identity(), nn.Sequential(nn.Identity())], ids=repr
)
def test_a_shortcut_that_does_nothing(shortcut, units) -> None:
    """CIFAR networks have an empty nn.Sequential."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
            self.shortcut = shortcut

        def forward(self, x):
            out = torch.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += self.shortcut(x)
            return torch.relu(out)

    torch.manual_seed(0)
    fused = assert_trains_the_same(randomize(Block()).double().train())
    assert len(units) == 2
    assert_one_unit(fused)


@pytest.mark.parametrize("name", ["resnet", "cifar"])
def test_a_network_in_the_plainest_loop_converts_its_image_once(name, monkeypatch) -> None:
    """Contiguous parameters and images: between its blocks the maps are channels_last."""
    torch.manual_seed(0)
    if name == "cifar":
        eager = fr.cifar_resnet(20)
        fused, blocks = copy.deepcopy(eager), 10
    else:
        models = pytest.importorskip("torchvision.models")
        eager = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
        fused, blocks = fr.fuse(copy.deepcopy(eager)), 5
    inputs = []
    original = training_unit._TrainingUnit.apply

    def apply(unit, tensors, x, *rest):
        inputs.append(x)
        return original(unit, tensors, x, *rest)

    monkeypatch.setattr(training_unit._TrainingUnit, "apply", apply)
    y = fused.train()(image(2, 3, 32, 32, dtype=torch.float32))
    assert len(inputs) == blocks
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    with fr.use_backend("reference"):
        torch.testing.assert_close(
            y, eager.train()(image(2, 3, 32, 32, dtype=torch.float32)), rtol=1e-3, atol=1e-3
        )
