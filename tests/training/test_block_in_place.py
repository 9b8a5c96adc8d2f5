"""Changes in place between forward and backward: errors where eager has them, and no others."""

from __future__ import annotations

import pytest
import torch
from networks import assert_same, image, randomize
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from training_blocks import X, basic, bottleneck, pair, state


def stem() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return randomize(model).double().train()


def biased() -> nn.Module:
    """In training its convolution is PyTorch's, and its norm an operation by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return randomize(model).double().train()


def freeze(model: nn.Module, kinds: type | tuple[type, ...]) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            module.requires_grad_(False)


#: What needs a gradient decides what eager saves.
SETTINGS = {
    "all": lambda model: None,
    "frozen convolutions": lambda model: freeze(model, nn.Conv2d),
    "frozen norms": lambda model: freeze(model, nn.BatchNorm2d),
    "frozen beginning": lambda model: [m.requires_grad_(False) for m in [*model.children()][:2]],
    "running statistics": lambda model: model.eval(),
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def outcome(model: nn.Module, changed: str, wanted: bool) -> dict[str, Tensor] | str:
    """The gradients after one of the model's tensors was changed; the error if there is one."""
    x = image(*X).contiguous(memory_format=torch.channels_last).requires_grad_(wanted)
    source = 1 * x if wanted else x
    y = model(source)
    loss = (2 * y).sum() if changed == "y" else y.square().sum()
    target = {"x": source, "y": y, **tensors_of(model)}[changed]
    with torch.no_grad():
        target.add_(1)
    if not loss.requires_grad:
        return "no gradient"
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return {**state(model), **({"x": x.grad} if wanted else {})}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", [basic, lambda: bottleneck(2), stem, biased])
def test_a_change_in_place_is_an_error_where_it_is_one_in_eager(make, setting) -> None:
    for changed in ("x", "y", *tensors_of(make())):
        if (make, setting, changed) == (biased, "running statistics", "0.bias"):
            continue  # stricter than eager: the operation's backward reads it
        for wanted in (True, False):
            models = pair(make())
            for model in models:
                SETTINGS[setting](model)
            eager, fused = [outcome(model, changed, wanted) for model in models]
            if isinstance(eager, str) or isinstance(fused, str):
                assert fused == eager, (changed, wanted)
            else:
                assert_same(fused, eager)


@pytest.mark.parametrize("make", [basic, lambda: bottleneck(2)])
def test_second_derivatives_after_a_bias_has_changed(make) -> None:
    models = pair(make())
    for model in models:
        x = image(*X).requires_grad_()
        y = model(x).square().sum()
        with torch.no_grad():
            model.bn1.bias.add_(1)
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        g.square().sum().backward()
    assert_same(state(models[1]), state(models[0]))
    assert models[1].bn1.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: basic(2), bottleneck])
@pytest.mark.parametrize("recompute", [True, False])
def test_second_derivatives_of_the_end_of_a_block(make, recompute) -> None:
    """The frozen beginning is a constant, of which nothing is saved but the first result."""
    models = pair(make(), recompute=recompute)
    for model in models:
        for name in ("conv1", "bn1", "conv2"):
            model.get_submodule(name).requires_grad_(False)
        y = model(image(*X)).square().sum()
        with torch.no_grad():
            model.bn1.weight.add_(1)
        chosen = model.bn2.weight, model.bn2.bias
        first = torch.autograd.grad(y, chosen, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert_same(state(models[1]), state(models[0]))
    assert models[1].bn2.weight.grad.abs().sum() > 0


def test_the_bias_that_is_computed_and_changed_has_no_second_derivative() -> None:
    """It is no leaf: what it was computed from is not known any more."""
    _, fused = pair(basic())
    bias = (0.5 * fused.bn1.bias).detach().requires_grad_() * 1
    x = image(*X).requires_grad_()
    y = torch.func.functional_call(fused, {"bn1.bias": bias}, (x,)).square().sum()
    bias.mul_(2)
    torch.autograd.grad(y, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="bias of a batch norm"):
        torch.autograd.grad(y, x, create_graph=True)
