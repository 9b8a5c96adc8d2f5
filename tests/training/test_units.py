"""Units outside of residual blocks: convolution and norm, a norm by itself, the stem."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_same, image, randomize, results
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.backends.activation import Activation
from fused_resnet.ops import training_unit
from fused_resnet.ops.training_reference import run_reference
from fused_resnet.ops.training_spec import Layer, LayerTensors, Unit, flatten, unflatten

BACKENDS = ["cpu", "library"]
NONE, LEAKY = Activation.NONE, Activation.LEAKY_RELU


def layer(stride=1, padding=1, dilation=1, groups=1, batch=True, momentum=0.1) -> Layer:
    pairs = [(v, v) for v in (stride, padding, dilation)]
    return Layer(*pairs, groups, 1e-5, momentum, batch)


def tensors(c: int, k: int, size: int, seed: int) -> LayerTensors:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, low: float = -1.0) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64) * (1.5 - low) + low

    weight = draw(k, c, size, size) / (c * size * size) ** 0.5
    bn = draw(k, low=0.5), draw(k)
    learned = [t.requires_grad_() for t in (weight, *bn)]
    return LayerTensors(*learned, draw(k), draw(k, low=0.5), torch.tensor(0))


def copied(t: LayerTensors) -> LayerTensors:
    return LayerTensors(*(v.detach().clone().requires_grad_(v.requires_grad) for v in t))


POOL = ((3, 3), (2, 2), (1, 1))
UNITS = {
    "conv": (Unit((layer(2),)), [(8, 12, 3)], None),
    "no relu": (Unit((layer(),), activation=NONE), [(8, 12, 3)], None),
    "map": (Unit((layer(2),), "map"), [(8, 12, 3)], (3, 12, 5, 4)),
    "map, no relu": (Unit((layer(2),), "map", activation=NONE), [(8, 12, 3)], (3, 12, 5, 4)),
    "running statistics": (Unit((layer(batch=False),), "map"), [(8, 8, 3)], (3, 8, 9, 7)),
    "stem": (Unit((layer(1, 3),), pool=POOL), [(8, 5, 7)], None),
    "stem by running statistics": (Unit((layer(batch=False),), pool=POOL), [(8, 5, 3)], None),
    "oblong pool": (Unit((layer(),), pool=((2, 3), (1, 2), (1, 0))), [(8, 5, 3)], None),
    "dilated": (Unit((layer(1, 2, 2),)), [(8, 5, 3)], None),
    "depthwise": (Unit((layer(groups=8),)), [(1, 8, 3)], None),
    "leaky": (Unit((layer(), layer()), activation=LEAKY), [(8, 8, 3), (8, 12, 3)], None),
    "leaky, map": (Unit((layer(2),), "map", activation=LEAKY), [(8, 12, 3)], (3, 12, 5, 4)),
    "leaky stem": (Unit((layer(1, 3),), activation=LEAKY, pool=POOL), [(8, 5, 7)], None),
    "zeros": (Unit((layer(2), layer()), "zeros", (2, 2)), [(8, 12, 3), (12, 12, 3)], None),
    "only a stride": (Unit((layer(2), layer()), "zeros", (0, 2)), [(8, 8, 3), (8, 8, 3)], None),
    "plain": (Unit((layer(), layer(2))), [(8, 4, 3), (4, 6, 3)], None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", UNITS)
def test_units_equal_the_operators_of_an_unfused_model(name, backend) -> None:
    unit, sizes, side = UNITS[name]
    held = [tensors(*size, seed=i) for i, size in enumerate(sizes)]
    outcomes = []
    for run in (training_unit.training_unit, run_reference):
        x = image(3, 8, 9, 7).requires_grad_()
        shortcut = None if side is None else image(*side, seed=7).requires_grad_()
        mine = [copied(t) for t in held]
        y = run(unit._replace(backend=backend), x, shortcut, mine)
        (y * image(*y.shape, seed=3)).sum().backward()
        found = {"y": y.detach(), "x": x.grad}
        found |= {} if shortcut is None else {"shortcut": shortcut.grad}
        for i, t in enumerate(mine):
            found |= {f"{i} {n}": v if v.grad is None else v.grad for n, v in t._asdict().items()}
        outcomes.append(found)
    assert_same(*outcomes)


@pytest.mark.parametrize("name", UNITS)
def test_the_flat_form_has_all_of_a_unit(name) -> None:
    unit = UNITS[name][0]
    odd = unit._replace(recompute=True, winograd=False, backend="library")
    average = unit._replace(layers=tuple(t._replace(momentum=None) for t in unit.layers))
    negative = unit._replace(layers=tuple(t._replace(momentum=-0.5) for t in unit.layers))
    for each in (unit, odd, average, negative):
        assert unflatten(*flatten(each), each.backend) == each


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_conv_bn_add_relu_in_training(relu, residual) -> None:
    """The public function, its gradients to any order and its running statistics."""
    t = tensors(3, 4, 3, 0)
    x = image(2, 3, 4, 4).requires_grad_()
    r = image(2, 4, 4, 4, seed=5).requires_grad_() if residual else None

    def call(x, weight, gamma, beta, *r):
        running = t.running_mean.clone(), t.running_var.clone()
        return ops.conv_bn_add_relu(
            x, weight, gamma, beta, *running, *r, padding=1, training=True, relu=relu
        )

    inputs = (x, *t[:3], *([] if r is None else [r]))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def stem() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    return randomize(model).double().train()


def test_the_stem_keeps_a_byte_for_each_maximum() -> None:
    eager = stem()
    fused = fr.fuse(copy.deepcopy(eager))
    x = image(2, 3, 29, 27)
    assert_same(results(fused, x), results(eager, x))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused(x)
    of_the_size_of_y = [t.dtype for t in kept if t.shape == y.shape]
    assert of_the_size_of_y == [torch.uint8]
    assert sum(t.dim() == 4 and t.shape[2:] == (15, 14) for t in kept) == 1, "z, and no other map"


def test_ties_in_the_pool_go_to_the_first() -> None:
    """As in PyTorch: a window without a positive value has its maximum, 0, many times."""
    eager = stem()
    with torch.no_grad():
        eager[1].bias.fill_(-1.0)
    fused = fr.fuse(copy.deepcopy(eager))
    x = (image(2, 3, 29, 27) * 4).round() / 4
    assert_same(results(fused, x), results(eager, x))


@pytest.mark.parametrize("biased", [True, False])
def test_statistics_are_updated_before_a_failing_backward_and_only_once(biased) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=biased), nn.BatchNorm2d(4), nn.ReLU())
    eager = randomize(model).double().train()
    fused = fr.fuse(copy.deepcopy(eager))
    for _ in range(2):
        assert_same(results(fused, image(2, 4, 6, 5)), results(eager, image(2, 4, 6, 5)))


def test_a_norm_by_itself_saves_and_updates_as_eager() -> None:
    x = image(3, 5, 4, 3).requires_grad_()
    running = torch.zeros(5).double(), torch.ones(5).double()
    versions = [t._version for t in running]
    y = ops.bn_add_relu(x, None, None, *running, training=True)
    assert [t._version for t in running] == versions, "as PyTorch's batch norm"
    expected = reference.bn_add_relu(
        x, None, None, *(t * 0 + i for i, t in enumerate(running)), training=True
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(running[0], 0.1 * x.detach().mean((0, 2, 3)))


@pytest.mark.parametrize("call", ["bn", "conv", "stem"])
def test_an_empty_batch_leaves_the_statistics(call) -> None:
    t = tensors(5, 5, 3, 0)
    x = image(0, 5, 8, 8).requires_grad_()
    before = t.running_mean.clone(), t.running_var.clone()
    if call == "bn":
        y = ops.bn_add_relu(x, *t[1:5], training=True)
    elif call == "conv":
        y = ops.conv_bn_add_relu(x, *t[:5], training=True)
    else:
        y = ops.conv_bn_relu_maxpool(x, *t[:5], training=True)
    y.sum().backward()
    torch.testing.assert_close((t.running_mean, t.running_var), before, rtol=0, atol=0)
    assert t.bn_weight.grad.abs().sum() == 0


def test_wrong_arguments_are_named() -> None:
    t = tensors(5, 5, 3, 0)
    with pytest.raises(ValueError, match="conv_bn_add_relu: x: expected more than 1 value"):
        ops.conv_bn_add_relu(image(1, 5, 3, 3), *t[:5], training=True)
    with pytest.raises(ValueError, match="conv_bn_relu_maxpool: x: expected more than 1 value"):
        ops.conv_bn_relu_maxpool(
            image(1, 5, 3, 3), *t[:5], stride=1, padding=0, pool_kernel=1, pool_stride=1,
            pool_padding=0, training=True,
        )  # fmt: skip
