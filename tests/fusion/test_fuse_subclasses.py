"""Blocks that were subclassed and children that were replaced keep their meaning."""

from __future__ import annotations

import pickle

import pytest
import torch
from networks import image
from torch import Tensor, nn

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision.models import resnet as tv_resnet  # noqa: E402
from torchvision_networks import PostAdd, Slim, assert_fused_equals_eager, small  # noqa: E402


class Named(tv_resnet.BasicBlock):
    """Keeps the forward, adds a method."""

    def name(self) -> str:
        return "named"


class Doubled(Slim):
    """Its own _forward_impl."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return 2 * super()._forward_impl(x)


def test_a_subclass_that_keeps_the_forward_is_fused() -> None:
    fused = assert_fused_equals_eager(small(Named), image(2, 3, 33, 29))
    assert isinstance(fused.layer1[0], Named)
    assert fused.layer1[0].name() == "named"
    assert fr.report(fused).left == []
    assert pickle.loads(pickle.dumps(fused.layer1[0])).name() == "named"


def test_a_subclass_with_its_own_forward_is_traced() -> None:
    fused = assert_fused_equals_eager(small(PostAdd), image(2, 3, 33, 29))
    found = fr.report(fused)
    assert dict(found.fused)["layer1.0.conv2"] == "conv_bn_add_relu"
    assert found.left == []
    fused = assert_fused_equals_eager(small(kind=Doubled), image(2, 3, 33, 29))
    found = fr.report(fused)
    assert found.counts["conv_bn_relu_maxpool"] == 1
    assert found.left == []


def test_a_forward_replaced_on_the_instance_is_called() -> None:
    model = small(tv_resnet.BasicBlock, (2, 1, 1, 1))
    model.layer1[1].forward = lambda x: x * 2
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(image(1, 3, 33, 29)), model(image(1, 3, 33, 29)))
    assert "layer1.1" in dict(fr.report(fused).left)
    later = fr.fuse(small())
    later.layer1[0].conv2.forward = lambda x: x * 0
    plain = small()
    plain.layer1[0].conv2.forward = lambda x: x * 0
    torch.testing.assert_close(later(image(1, 3, 33, 29)), plain(image(1, 3, 33, 29)))


def replace_relu(model: nn.Module) -> None:
    model.layer1[0].relu = nn.SiLU(inplace=True)
    model.relu = nn.LeakyReLU(0.2)


def replace_norm(model: nn.Module) -> None:
    model.layer1[0].bn2 = nn.GroupNorm(4, 8).double()
    model.layer2[0].bn3 = nn.SyncBatchNorm(64).double().eval()


def parametrize(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv2)


def pad_with_reflections(model: nn.Module) -> None:
    model.layer1[0].conv2.padding_mode = "reflect"
    model.layer1[0].conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def other_shortcut(model: nn.Module) -> None:
    conv, bn = model.layer2[0].downsample
    conv.stride = (1, 1)
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv, bn)


def deeper_stem(model: nn.Module) -> None:
    model.conv1 = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 64, 3, 1, 1)
    ).double()


def no_max_pool(model: nn.Module) -> None:
    model.conv1.stride = (4, 4)
    model.maxpool = nn.Identity()


def ceil_max_pool(model: nn.Module) -> None:
    model.maxpool = nn.MaxPool2d(2, 2, ceil_mode=True)  # the map is 17 x 15


def stop_tracking(model: nn.Module) -> None:
    model.layer1[0].bn1.track_running_stats = False  # the statistics stay, and stay as they are


def shared(model: nn.Module) -> None:
    first, second = model.layer1
    second.conv2.weight = first.conv2.weight
    second.conv3 = first.conv3
    second.bn2 = second.bn1


CHANGES = {
    replace_relu: {"layer1.0.conv1", "conv1"},  # still fused, up to the batch norm
    replace_norm: set(),
    parametrize: {"layer1.0.bn2"},
    pad_with_reflections: {"layer1.0.bn2"},
    other_shortcut: {"layer2.0.downsample.1"},
    deeper_stem: {"conv1.0", "bn1"},
    no_max_pool: {"conv1"},
    ceil_max_pool: {"conv1"},
    stop_tracking: {"layer1.0.conv1"},
    shared: {f"layer1.{i}.conv{k}" for i in (0, 1) for k in (1, 2, 3)},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_replaced_children_give_the_same_results(change) -> None:
    model = small(layers=(2, 1, 1, 1))
    change(model)
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(image(1, 3, 33, 29)), model(image(1, 3, 33, 29)))
    assert CHANGES[change] <= dict(fr.report(fused).fused).keys()
    if change is not replace_norm:  # SyncBatchNorm does not train on a CPU, in PyTorch either
        assert_fused_equals_eager(model, image(2, 3, 33, 29))


def test_children_replaced_after_fusing_take_effect() -> None:
    for change in CHANGES:
        model, fused = small(layers=(2, 1, 1, 1)), fr.fuse(small(layers=(2, 1, 1, 1)))
        for target in (model, fused):
            torch.manual_seed(3)
            change(target)
        x = image(1, 3, 33, 29)
        torch.testing.assert_close(fused(x), model(x), msg=change.__name__)


def test_report_gives_the_reason() -> None:
    model = small()
    replace_norm(model)
    parametrize(model)
    pad_with_reflections(small())
    model.layer4[0].conv1.register_forward_hook(lambda *_: None)
    model.layer4[0].bn2.register_forward_hook(lambda *_: None)
    assert fr.report(fr.fuse(model)).left == [
        ("layer1.0.conv2", "GroupNorm is not a plain BatchNorm2d"),
        ("layer2.0.conv3", "SyncBatchNorm is not a plain BatchNorm2d"),
        ("layer4.0.conv1", "a hook or a replaced forward on the Conv2d"),
        ("layer4.0.conv2", "a hook or a replaced forward on the BatchNorm2d"),
    ]
