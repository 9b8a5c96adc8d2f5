"""Autocast, GradScaler, half-precision models, and float32 beside PyTorch's own error."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import image, randomize
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from training_blocks import X, basic, bottleneck

import fused_resnet as fr
from fused_resnet.ops import training_unit

HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


def gradients(
    model: nn.Module, x: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x)
    (y.double() * image(*y.shape, seed=3)).sum().backward()
    found = {"y": y.detach()} | {k: p.grad for k, p in model.named_parameters()}
    return found | {k: b.clone() for k, b in model.named_buffers() if b.is_floating_point()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {k: ((found[k].double() - t).norm() / t.norm()).item() for k, t in truth.items()}


#: What one element does whose ReLU rounding turns the other way: in a bias's gradient, a sum of a
#: few hundred elements, about this much. PyTorch's rounding turns some as ours does.
TURNED = 2e-2


def assert_about_as_exact(
    fused: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    ours, theirs = errors(fused, truth), errors(eager, truth)
    bound = max(1.5 * max(theirs.values()), TURNED)
    for name, error in ours.items():
        assert error <= bound, f"{name}: {error:.1e}, PyTorch {theirs[name]:.1e}"
    # The forward has no such jumps.
    assert ours["y"] <= 1.5 * theirs["y"]


def rounded(model: nn.Module) -> nn.Module:
    """Parameters that half precision holds, so that casting them is no part of the error."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    return model


@halves
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [basic, bottleneck])
def test_autocast(make, stride, dtype) -> None:
    """Maps in half precision, parameters, statistics and gradients in float32."""
    exact = rounded(make(stride))
    x = image(8, *X[1:]).to(dtype)
    eager = copy.deepcopy(exact).float()
    fused = fr.fuse(copy.deepcopy(eager))
    ran = []
    original = training_unit._TrainingUnit.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training_unit._TrainingUnit, "apply", lambda *a: ran.append(a[0]) or original(*a)
        )
        found = gradients(fused, x, dtype)
    assert len(ran) == 1
    theirs = gradients(eager, x, dtype)
    for name, value in theirs.items():
        assert found[name].dtype is value.dtype, name
    assert_about_as_exact(found, theirs, gradients(exact, x.double()))


@halves
def test_autocast_casts_an_input_of_another_dtype(dtype) -> None:
    """As the unfused block: the first convolution casts, the addition promotes or does not."""
    eager = basic().float()
    fused = fr.fuse(copy.deepcopy(eager))
    found, theirs = (gradients(m, image(*X).float(), dtype) for m in (fused, eager))
    assert found["y"].dtype is theirs["y"].dtype
    assert max(errors(found, {k: v.double() for k, v in theirs.items()}).values()) < 0.1


def test_a_model_in_bfloat16_whole() -> None:
    exact = rounded(bottleneck(2))
    eager = copy.deepcopy(exact).to(torch.bfloat16)
    fused = fr.fuse(copy.deepcopy(eager))
    x = image(8, *X[1:]).bfloat16()
    found, theirs = gradients(fused, x), gradients(eager, x)
    for name, value in theirs.items():
        assert found[name].dtype is value.dtype, name
    exact.load_state_dict(copy.deepcopy(bottleneck(2).state_dict()))
    assert_about_as_exact(found, theirs, gradients(rounded(exact), x.double()))


def test_gradient_scaler_steps_and_skips_as_eager() -> None:
    models = [basic().float()]
    models.append(fr.fuse(copy.deepcopy(models[0])))
    scales = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            loss = model(image(*X).float()).square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] == 2.0**9
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("winograd", [True, False])
def test_float32_is_about_as_exact_as_pytorch(winograd) -> None:
    """With ReLU's decisions given: the maps are far from the kink, so that rounding turns none."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + x)

    torch.manual_seed(0)
    exact = randomize(Block()).train()
    with torch.no_grad():  # a channel's values are all above zero, or all below
        for bn in (exact.bn1, exact.bn2):
            bn.bias.copy_(torch.tensor([8.0, -8.0]).repeat(8))
            bn.weight.clamp_(0.5, 1.0)
    eager = copy.deepcopy(exact).to(memory_format=torch.channels_last)
    fused = fr.fuse(copy.deepcopy(eager), winograd=winograd)
    x = image(2, 16, 20, 20).float()
    found, theirs = gradients(fused, x), gradients(eager, x)
    truth = gradients(exact.double(), x.double())
    found, theirs, truth = (
        {k: v for k, v in d.items() if truth[k].norm() > 1e-3} for d in (found, theirs, truth)
    )
    ours, pytorchs = errors(found, truth), errors(theirs, truth)
    for name, error in ours.items():
        bound = max(5e-6, 1.5 * pytorchs[name])
        assert error <= bound, f"{name}: {error:.1e}, PyTorch {pytorchs[name]:.1e}"
