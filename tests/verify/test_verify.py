"""``fused-resnet verify``: its bound, the planted bugs that it must catch, and that it passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet import ops, reference
from fused_resnet.bench.calibration import batch_norms, calibrate, randomise
from fused_resnet.bench.networks import random_model
from fused_resnet.verify import LIMIT, ROUNDING, Row, verify_networks, verify_operations
from fused_resnet.verify import networks as verified_networks
from fused_resnet.verify.operations import CASES, DTYPES, FORMATS, FROZEN, MODES
from fused_resnet.verify.rows import Comparison, compare, relative_error, worst

# The rule


def test_relative_error_is_that_of_all_tensors_as_one_vector() -> None:
    truth = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    answer = [torch.tensor([3.0, 0.6]), torch.tensor([[4.8]])]
    assert relative_error(answer, truth) == pytest.approx(1.0 / 5.0)


def test_relative_error_of_the_unexpected() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error([zero], [zero]) == 0.0
    assert relative_error([one], [zero]) == math.inf
    assert math.isnan(relative_error([one * math.nan], [one]))
    with pytest.raises(ValueError, match="expected"):
        relative_error([torch.ones(3)], [one])


def test_an_error_passes_up_to_its_bound() -> None:
    eps = torch.finfo(torch.float32).eps
    assert compare("", 0.0, 1e-3, torch.float32).bound == pytest.approx(LIMIT * 1e-3)
    assert compare("", 0.0, 0.0, torch.float32).bound == pytest.approx(ROUNDING * eps)


def row_of(*comparisons: Comparison) -> Row:
    return worst(comparisons, "op", "inference", torch.float32, "contiguous")


def test_the_worst_comparison_makes_the_row() -> None:
    near, far = Comparison("near", 1.4, 1.0, 1.5), Comparison("far", 3.0, 10.0, 15.0)
    assert row_of(far, near).what == "near"
    assert row_of(far, near).ratio == pytest.approx(1.4)
    assert row_of(far, near).passed
    assert not row_of(Comparison("over", 1.6, 1.0, 1.5), far).passed
    assert not row_of(near, Comparison("nan", math.nan, 1.0, 1.5), far).passed
    assert row_of(Comparison("exact", 0.0, None, 1e-9)).ratio is None


# Operations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_passes(dtype: torch.dtype) -> None:
    rows = list(verify_operations([dtype]))
    expected = {
        (operation, mode, memory_format)
        for operation in (*CASES, "residual_block")
        for mode in (MODES if operation not in FROZEN else MODES[:1])
        for memory_format in FORMATS
    }
    assert {(r.subject, r.mode, r.memory_format) for r in rows} == expected
    assert [r for r in rows if not r.passed] == []


def test_the_reference_backend_is_pytorch_itself() -> None:
    rows = list(verify_operations([torch.float32], backend="reference"))
    assert rows
    assert all(r.ratio in (1.0, None) for r in rows)
    assert not any(r.subject in FROZEN for r in rows)


def _swapped(function: Any, **changes: Any) -> Any:
    """The function with its arguments replaced, as a planted bug would."""

    def planted(*args: Any, **kwargs: Any) -> Tensor:
        for name, change in changes.items():
            if name in kwargs:
                kwargs[name] = change(kwargs[name])
        return function(*args, **kwargs)

    return planted


@pytest.mark.parametrize(
    ("operation", "planted", "modes"),
    [
        pytest.param(
            "bn_add_relu",
            _swapped(reference.bn_add_relu, residual=lambda r: 0 * r),
            {"inference", "training", "backward", "backward in eval"},
            id="residual forgotten",
        ),
        pytest.param(
            "conv_bn_add_relu",
            _swapped(reference.conv_bn_add_relu, bn_bias=lambda b: b.roll(1)),
            {"inference", "training", "backward", "backward in eval"},
            id="channel off by one",
        ),
        pytest.param(
            "bn_add_relu",
            lambda *a, **k: reference.bn_add_relu(*a, **{**k, "momentum": 0.9}),
            {"training"},
            id="momentum reversed",
        ),
        pytest.param(
            "conv_bn_relu_maxpool",
            lambda *a, **k: reference.conv_bn_relu_maxpool(*a, **{**k, "eps": 1e-3}),
            {"inference", "training", "backward", "backward in eval"},
            id="another eps",
        ),
    ],
)
def test_a_planted_bug_fails(
    monkeypatch: pytest.MonkeyPatch, operation: str, planted: Any, modes: set[str]
) -> None:
    monkeypatch.setattr(ops, operation, planted)
    rows = [r for r in verify_operations([torch.float32]) if r.subject == operation]
    assert {r.mode for r in rows if not r.passed} == modes


# Networks


def test_resnet18_passes() -> None:
    rows = list(verify_networks(["resnet18"], [torch.float32, torch.float64], seeds=[0]))
    assert {(r.mode, r.dtype) for r in rows} == {
        (mode, dtype)
        for dtype in ("float32", "float64")
        for mode in (
            "inference",
            "training step: loss",
            "training step: gradients",
            "training step: running statistics",
        )
    }
    assert {r.what for r in rows if r.mode == "inference"} == {
        "fused: logits",
        "frozen: logits",
        "frozen, Winograd: logits",
    }
    assert [r for r in rows if not r.passed] == []


def test_a_network_with_one_wrong_statistic_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(model: nn.Module) -> nn.Module:
        model.get_submodule("layer3.1.bn2").momentum = 0.2  # type: ignore[assignment]
        return model

    monkeypatch.setattr(verified_networks.fr, "fuse", fuse)
    monkeypatch.setattr(verified_networks, "SIZE", 32)
    rows = list(verify_networks(["resnet18"], [torch.float64], seeds=[0]))
    failed = [r for r in rows if not r.passed]
    assert [r.mode for r in failed] == ["training step: running statistics"]
    assert "layer3.1.bn2" in failed[0].what


def test_float32_gradients_are_clear_of_kinks() -> None:
    """Why verify may hold float32 gradients of a network to 1.5 times PyTorch's own error.

    With ordinary parameters the distance between two right answers is a matter of which activations
    rounding carried across zero; here PyTorch's own float32 gradients must be exact to rounding.
    """
    rows = verify_networks(["resnet18"], [torch.float32], seeds=[0])
    gradients = next(r for r in rows if r.mode == "training step: gradients")
    assert gradients.pytorch_error is not None
    assert gradients.pytorch_error < 5e-5


# What both kinds of networks rest on


def test_calibrated_statistics_are_those_of_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    calibrate(model, *batches)
    maps = [model[0](batch) for batch in batches]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    assert model[1].momentum == 0.1
    assert not model.training


def test_random_models_are_the_same_every_time_and_leave_nothing_trivial() -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, two = (random_model("resnet18", images, seed=3) for _ in range(2))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for bn in batch_norms(one):
        for vector in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            assert vector is not None
            assert vector.std() > 1e-3
    assert torch.isfinite(one(images)).all()


def test_randomise_draws_every_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(64))
    randomise(model, torch.Generator().manual_seed(0))
    for bn in batch_norms(model):
        assert 0.5 <= bn.weight.min() < 0.6 < 1.4 < bn.weight.max() <= 1.5
        assert 0.05 < bn.bias.std() < 0.2
