"""Hooks on fused models see the modules and values that they see on the original."""

from __future__ import annotations

import pytest
import torch
from networks import assert_same, image, results
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision_networks import small  # noqa: E402


def every_hook(module: nn.Module, seen: list[str], name: str) -> None:
    module.register_forward_pre_hook(lambda m, a: seen.append(f"{name} pre"))
    module.register_forward_hook(lambda m, a, y: seen.append(f"{name} post {y.sum().item():.6f}"))


@pytest.mark.parametrize("child", ["conv1", "bn1", "conv2", "bn3", "relu", "downsample.1", ""])
def test_hooks_on_any_child_see_the_same_values(child: str) -> None:
    model, fused = small(), fr.fuse(small())
    expected: list[str] = []
    seen: list[str] = []
    every_hook(model.layer2[0].get_submodule(child), expected, child)
    every_hook(fused.layer2[0].get_submodule(child), seen, child)
    x = image(2, 3, 33, 29)
    assert_same(results(fused, x), results(model, x))
    assert len(expected) >= 2
    assert seen == expected


def test_a_hook_can_change_the_output_and_be_removed() -> None:
    model, fused = small(), fr.fuse(small())
    x = image(1, 3, 33, 29)
    plain = fused(x)
    handles = [
        m.layer1[0].conv2.register_forward_hook(lambda m, a, y: y * 2) for m in (model, fused)
    ]
    torch.testing.assert_close(fused(x), model(x))
    assert not torch.allclose(fused(x), plain)
    for handle in handles:
        handle.remove()
    assert torch.equal(fused(x), plain)


def test_global_hooks_see_every_module() -> None:
    model, fused = small(), fr.fuse(small())
    names: list[str] = []
    handle = register_module_forward_hook(lambda m, a, y: names.append(type(m).__name__))
    try:
        model(image(1, 3, 33, 29))
        expected, names[:] = [n for n in names], []
        fused(image(1, 3, 33, 29))
    finally:
        handle.remove()
    assert sorted(n.removeprefix("Fused") for n in names) == sorted(expected)


def test_hooks_registered_before_are_shared_not_copied() -> None:
    seen: list[int] = []

    class Recorder:
        def hook(self, module: nn.Module, args: object, y: Tensor) -> None:
            seen.append(id(self))

    recorder, model = Recorder(), small()
    model.layer1.register_forward_hook(recorder.hook)
    fr.fuse(model)(image(1, 3, 33, 29))
    assert seen == [id(recorder)]


def test_a_hook_that_is_a_method_of_the_model_becomes_the_copys_method() -> None:
    class Recording(nn.Sequential):
        def record(self, module: nn.Module, args: object, y: Tensor) -> None:
            self.seen = y

    model = Recording(small())
    model[0].register_forward_hook(model.record)
    fused = fr.fuse(model)
    y = fused(image(1, 3, 33, 29))
    assert fused.seen is y
    assert not hasattr(model, "seen")
