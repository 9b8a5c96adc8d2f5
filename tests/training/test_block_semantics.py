"""What autograd and modules promise, for a residual block that is one node of the graph."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import assert_same, image, results
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from training_blocks import X, assert_one_unit, basic, bottleneck, pair, state

import fused_resnet as fr
from fused_resnet.ops import registry

AVERAGE = functools.partial(nn.BatchNorm2d, momentum=None)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, AVERAGE], ids=["momentum", "average"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_statistics_as_often_as_eager(norm, reentrant) -> None:
    models = pair(basic(2, norm))
    for model in models:
        for _ in range(3):
            x = image(*X).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert models[1].bn2.num_batches_tracked == 6, "in the forward, and once more in backward"
    assert_same(state(models[1]), state(models[0]))


def test_checkpointed_operations_outside_of_blocks() -> None:
    """A convolution with its norm, a norm by itself, and the stem with its pool."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    biased = [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*stem, nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), *biased)
    models = pair(model.double().train())
    for m in models:
        x = image(2, 3, 13, 12).requires_grad_()
        checkpoint_sequential(m, 1, x, use_reentrant=False).square().sum().backward()
        checkpoint(m, x, use_reentrant=False).square().sum().backward()
    assert_same(state(models[1]), state(models[0]))


def test_backward_twice_with_retain_graph() -> None:
    models = pair(bottleneck(2))
    for model in models:
        loss = model(image(*X)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_same(state(models[1]), state(models[0]))


@pytest.mark.parametrize("changed", ["x", "y", "weight"])
def test_a_saved_tensor_that_is_changed_in_place_is_detected(changed) -> None:
    _, fused = pair(basic())
    x = image(*X)
    y = fused(x)
    target = {"x": x, "y": y, "weight": fused.conv2.weight}[changed]
    with torch.no_grad():
        target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_may_be_updated_between_forward_and_backward() -> None:
    """Two calls, then both backwards: PyTorch's batch norm allows it."""
    models = pair(basic())
    for model in models:
        a, b = model(image(*X)), model(image(*X, seed=5))
        (a.square().sum() + b.sum()).backward()
    assert_same(state(models[1]), state(models[0]))


def test_fused_and_unfused_calls_of_shared_buffers_mix() -> None:
    """PyTorch's batch norm saves its running statistics; that ours updates them is no change."""
    eager = basic()
    fused = fr.fuse(eager)
    x = image(*X).requires_grad_()
    y = eager(x)
    fused(y).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("make", [basic, bottleneck])
@pytest.mark.parametrize("mode", ["training", "eval"])
def test_second_derivatives(make, mode) -> None:
    """A gradient penalty: the gradient of the norm of a gradient."""
    models = pair(make(2).train(mode == "training"))
    for model in models:
        x = image(*X).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert_same(state(models[1]), state(models[0]))
    assert models[1].conv1.weight.grad.abs().sum() > 0


def test_hessian_vector_product() -> None:
    eager, fused = pair(basic())
    x = image(*X)

    def product(model):
        return torch.autograd.functional.hvp(lambda x: model(x).square().sum(), x, x)[1]

    assert product(eager).norm() > 1
    torch.testing.assert_close(product(fused), product(eager), rtol=1e-9, atol=1e-9)


def functional(model):
    """The model as a function of its input and all that it has; nothing of it is captured."""
    held = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    return lambda x: torch.func.functional_call(model, {k: v.clone() for k, v in held.items()}, x)


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(training) -> None:
    eager, fused = pair(bottleneck(2).train(training))
    x = image(*X)

    def tangent(model):
        return torch.func.jvp(functional(model), (x,), (image(*X, seed=4),))[1].detach()

    assert tangent(eager).norm() > 0.1
    torch.testing.assert_close(tangent(fused), tangent(eager), rtol=1e-9, atol=1e-9)


def test_function_transforms() -> None:
    eager, fused = pair(basic(2))
    x = image(*X)
    parameters = dict(eager.named_parameters())

    def loss(model, parameters, x):
        buffers = {k: v.clone() for k, v in model.named_buffers()}
        return torch.func.functional_call(model, {**parameters, **buffers}, x).square().sum()

    found = [torch.func.grad(lambda p, m=m: loss(m, p, x))(parameters) for m in (fused, eager)]
    assert_same(*found)
    batches = torch.stack([x, 2 * x])
    mapped = [torch.func.vmap(m.eval())(batches).detach() for m in (fused, eager)]
    torch.testing.assert_close(*mapped, rtol=1e-9, atol=1e-9)


def test_functional_call_with_other_parameters() -> None:
    eager, fused = pair(basic())
    others = {k: (v * 0.5).detach().requires_grad_() for k, v in eager.named_parameters()}
    found = []
    for model in (fused, eager):
        y = torch.func.functional_call(model, others, (image(*X),))
        found.append(torch.autograd.grad(y.square().sum(), list(others.values())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_hooks_are_called_and_gone_again() -> None:
    eager, fused = pair(bottleneck())
    seen = []
    handle = fused.bn2.register_forward_hook(lambda m, x, y: seen.append(y.detach().clone()))
    hooked = "a hook or a replaced forward on the BatchNorm2d"
    assert [reason for _, reason in fr.report(fused).blocks] == [hooked]
    assert_same(results(fused, image(*X)), results(eager, image(*X)))
    assert len(seen) == 1
    handle.remove()
    assert_one_unit(fused)
    assert_same(results(fused, image(*X)), results(eager, image(*X)))
    assert len(seen) == 1


@pytest.mark.parametrize("member", ["relu", "conv1", "downsample", "downsample.0", "downsample.1"])
def test_a_hook_on_any_member_runs_its_groups_one_by_one(member) -> None:
    _, fused = pair(basic(2))
    seen = []
    fused.get_submodule(member).register_forward_pre_hook(lambda m, x: seen.append(m))
    fused(image(*X))
    assert seen
    assert fr.report(fused).blocks[0][1]


def test_a_parametrised_weight_runs_its_groups_one_by_one() -> None:
    eager = basic()
    nn.utils.parametrizations.weight_norm(eager.conv1)
    eager, fused = pair(eager)
    assert "plain Conv2d" in fr.report(fused).blocks[0][1]
    assert_same(results(fused, image(*X)), results(eager, image(*X)))


def test_copies_are_independent() -> None:
    eager, fused = pair(basic())
    twin = copy.deepcopy(fused)
    assert twin.fused_resnet_recompute is False
    expected = results(eager, image(*X))
    assert_same(results(twin, image(*X)), expected)
    assert fused.bn1.num_batches_tracked == 0
    assert_same(results(fused, image(*X)), expected)


def test_an_error_half_way_leaves_no_trace(monkeypatch) -> None:
    _, fused = pair(basic())
    before = {k: b.clone() for k, b in fused.named_buffers()}
    primitives = registry.primitives_of("cpu")

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(primitives, "block_end", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused(image(*X))
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, before[name]), name
    monkeypatch.undo()
    assert_same(results(fused, image(*X)), results(basic(), image(*X)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_a_batch_that_is_refused_is_not_counted(name, momentum) -> None:
    """By the first convolution, and by the second in a block whose groups run one by one."""
    eager, fused = pair(basic())
    for model in (eager, fused):
        getattr(model, name).momentum = momentum
        conv = model.conv1 if name == "bn1" else model.conv2
        weight = conv.weight
        conv.weight = nn.Parameter(weight[:, :3].detach())
        with pytest.raises((RuntimeError, ValueError)):
            model(image(*X))
        conv.weight = weight
        assert getattr(model, name).num_batches_tracked == 0
    assert_same(results(fused, image(*X)), results(eager, image(*X)))


def test_an_empty_batch_is_pytorchs() -> None:
    models = pair(basic(2))
    for model in models:
        y = model(image(*X)[:0].requires_grad_())
        assert y.shape == (0, 12, 5, 4)
        y.sum().backward()
    assert_same(state(models[1]), state(models[0]))
    assert torch.isfinite(models[1].bn1.running_var).all()


def test_one_value_per_channel_is_an_error() -> None:
    _, fused = pair(basic())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(image(1, 8, 1, 1))
    assert fused.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("make", [basic, bottleneck])
@pytest.mark.parametrize("wanted", [True, False], ids=["all", "not the input"])
def test_operations_are_counted_as_eager(make, wanted) -> None:
    counts = []
    for model in pair(make(2)):
        with FlopCounterMode(display=False) as counter:
            model(image(*X).requires_grad_(wanted)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
