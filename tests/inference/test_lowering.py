"""What becomes a program: the steps, what is called between them, and what must not be one."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fused_resnet as fr
from fused_resnet.backends.activation import Activation
from fused_resnet.inference.lowered import Lowered
from fused_resnet.inference.plan import Plan
from fused_resnet.ops.program_steps import LENGTH, OPERATIONS, Step, decode, encode


def test_steps_as_integers_and_back() -> None:
    steps = [
        Step(
            operation,
            i,
            residual=i - 1,
            tensor=3 * i,
            activation=Activation(i % 2),
            kernel=(2 + i, 3),
            stride=(4, 5 + i),
            padding=(6, 7),
            dilation=(8, 9),
            groups=10 + i,
            out_channels=11,
            winograd=not i % 2,
            pool_kernel=(12, 13),
            pool_stride=(14, 15),
            pool_padding=(16, 17),
            zeros=18,
            ceil_mode=i == 1,
        )
        for i, operation in enumerate(OPERATIONS)
    ]
    numbers = encode(steps)
    assert len(numbers) == LENGTH * len(OPERATIONS)
    assert numbers[LENGTH : LENGTH + 9] == [1, 1, 0, 3, 1, 3, 3, 4, 6]
    assert numbers[2 * LENGTH - 2 : 2 * LENGTH] == [18, 1]
    assert decode(numbers) == steps


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    made = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outputs))


def frozen_of(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomize(model).double().eval()
    return model, fr.freeze(model)


def agrees(model: nn.Module, frozen: nn.Module, *inputs: Tensor, **named: Any) -> None:
    """The same structure and values as the eager model, which must not change its inputs either."""
    with torch.no_grad():
        expected = model(*[x.clone() for x in inputs], **named)
    got = frozen(*[x.clone() for x in inputs], **named)
    assert type(got) is type(expected)
    leaves = [tree_leaves(y) for y in (got, expected)]
    for value, truth in zip(*leaves, strict=True):
        assert type(value) is type(truth)
        if isinstance(truth, Tensor):
            assert value.shape == truth.shape
            assert_same({"": value}, {"": truth})
        else:
            assert value == truth


def programs_of(module: nn.Module) -> list[dict[str, int]]:
    """How often each program of a module has each operation."""
    plan: Plan = module.fused_resnet_plan
    return [dict(Counter(step.operation for step in p.steps)) for p in plan.programs]


def tv(name: str, **settings: Any) -> Any:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return lambda: models.get_model(name, weights=None, **settings)


def segmentation() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )


def backbone() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    layers = {"layer2": "a", "layer4": "b"}
    return models._utils.IntermediateLayerGetter(models.resnet18(weights=None), layers)


def timm(name: str, **settings: Any) -> nn.Module:
    return pytest.importorskip("timm", reason="timm is not installed").create_model(
        name, **settings
    )


HEAD = {"global_avg_pool": 1, "linear": 1}
NETWORKS = {
    "ours": (lambda: fr.resnet18(num_classes=5), [{"conv_max_pool": 1, "conv": 19, **HEAD}]),
    "torchvision's": (
        lambda: tv("resnet50")(),
        [{"conv_max_pool": 1, "conv": 52, **HEAD}],
    ),
    "zero-padded shortcuts": (
        lambda: fr.cifar_resnet(20),
        [{"conv": 19, "zero_pad_shortcut": 2, **HEAD}],
    ),
    "projections": (lambda: fr.cifar_resnet(20, shortcut="B"), [{"conv": 21, **HEAD}]),
    "without shortcuts": (lambda: fr.cifar_resnet(20, residual=False), [{"conv": 19, **HEAD}]),
    "blocks in a sequence": (
        lambda: nn.Sequential(fr.nn.BasicBlock(3, 3), fr.nn.BasicBlock(3, 3)),
        [{"conv": 4}],
    ),
    "segmentation": (segmentation, [{"conv_max_pool": 1, "conv": 54}]),
    "a backbone": (backbone, [{"conv_max_pool": 1, "conv": 19}]),
    "timm's": (lambda: timm("resnet18"), [{"conv_max_pool": 1, "conv": 19, **HEAD}]),
    "timm's features": (
        lambda: timm("resnet18", features_only=True),
        [{"conv": 20, "max_pool": 1}],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_lowered_once(name: str) -> None:
    make, programs = NETWORKS[name]
    model, frozen = frozen_of(make())
    assert programs_of(frozen) == programs
    agrees(model, frozen, image(2, 3, 64, 64))
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert programs_of(other) == programs
        agrees(model, other, image(1, 3, 64, 64))


def test_pools_with_ceil_mode_cut_no_network() -> None:
    """Inception's modules are one program each, with four results, and timm's network is one."""
    model, frozen = frozen_of(tv("googlenet", init_weights=False, aux_logits=False)())
    assert programs_of(frozen.inception3a) == [{"conv": 6, "max_pool": 1}]
    agrees(model, frozen, image(2, 3, 97, 75))
    model, frozen = frozen_of(timm("resnet26d"))
    assert programs_of(frozen) == [{"conv": 30, "conv_max_pool": 1, "avg_pool": 3, **HEAD}]
    agrees(model, frozen, image(2, 3, 97, 75))


def test_what_is_not_ours_cuts_a_network() -> None:
    """A gate inside each block, and two results of a program."""
    model, frozen = frozen_of(timm("seresnet18"))
    convs = [program["conv"] for program in programs_of(frozen)]
    assert len(convs) == 8
    assert sum(convs) == 19
    agrees(model, frozen, image(2, 3, 64, 64))


def test_a_stem_whose_last_batch_norm_is_outside() -> None:
    model, frozen = frozen_of(timm("resnet18d"))
    agrees(model, frozen, image(2, 3, 64, 64))


class Forward(nn.Module):
    """Two convolutions, and a forward that is given."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4, 3, 2)
        self.again_a = conv(3, 4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.drop, self.average = nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
        self.head, self.again = nn.Linear(4, 5), nn.Linear(5, 2)
        self.ceil = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mean = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def added(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return F.relu(F.relu(m.b(h)) + h)


def added_without_relu(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(m.a(x))


def averaged(m: Any, x: Tensor) -> Tensor:
    return m.again(m.drop(m.head(m.a(x).relu().mean((2, 3)))))


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.again(m.head(torch.flatten(m.average(m.a(x)), 1)))


def pooled(m: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(m.pool(m.a(x).relu()), 3, 1, 1)


def several(m: Any, x: Tensor) -> Any:
    y = m.relu(m.a(x))
    z = m.b(y)
    return {"y": y, "rest": [z, (m.average(z), x)], "none": None, "number": 3}


def zeros_added(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return F.relu(F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 0, 0)) + m.c(h))


def ceil_pooled(m: Any, x: Tensor) -> Any:
    """A stem, and a branch whose pool reads what other branches convolve."""
    return m.ceil(m.a(x).relu()), m.again_a(m.ceil(x))


def ceil_averaged(m: Any, x: Tensor) -> Tensor:
    """timm's shortcut: half the size, rounded up, as behind a convolution of stride 2."""
    h = m.a(x).relu()
    return F.relu(m.c(h) + m.b(m.mean(h)))


LOWERED = {
    added: {"conv": 2, "add_relu": 1},
    added_without_relu: {"conv": 3},
    averaged: {"conv": 1, "global_avg_pool": 1, "linear": 2},
    flattened: {"conv": 1, "global_avg_pool": 1, "linear": 2},
    several: {"conv": 2, "global_avg_pool": 1},
    zeros_added: {"conv": 2, "zero_pad_shortcut": 1},
    ceil_pooled: {"conv": 2, "max_pool": 2},
    ceil_averaged: {"conv": 3, "avg_pool": 1},
}


@pytest.mark.parametrize("run", LOWERED, ids=lambda run: run.__name__)
def test_forwards_that_are_lowered(run: Any) -> None:
    model, frozen = frozen_of(type("Own", (Forward,), {"forward": run})(None))
    assert programs_of(frozen) == [LOWERED[run]]
    with torch.no_grad():
        one = isinstance(model(image(1, 3, 8, 8)), Tensor)
    assert frozen.fused_resnet_plan.single is one, "nothing is called behind the program"
    for shape in ((2, 3, 12, 10), (1, 3, 13, 11)):
        agrees(model, frozen, image(*shape))


def broadcast_channels(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.a(x) + m.a(x).mean(1, keepdim=True))


def broadcast_pixels(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.a(x) + m.average(m.b(m.a(x))))


def other_input(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.b(m.a(x).sigmoid()) + m.a(x))


def features(m: Any, x: Tensor) -> Tensor:
    return torch.flatten(m.average(m.a(x)), 1)


def of_the_channels(m: Any, x: Tensor) -> Tensor:
    return m.a(x).mean(1)


def overwritten_later(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.b(y)
    y.relu_()
    return z + y


def result_overwritten(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = y.relu_()
    return y, m.b(z)


def input_overwritten(m: Any, x: Tensor) -> Tensor:
    return m.a(m.relu(x))


def read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return F.relu(y) + m.b(y)


def ceil(m: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(m.a(x), 2, ceil_mode=True)


def twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + y


def unused(m: Any, x: Tensor) -> Tensor:
    m.b(m.a(x))
    return m.a(x)


def by_the_values(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else m.b(m.a(x))


def by_the_size(m: Any, x: Tensor) -> Tensor:
    return m.a(x) if x.shape[2] > 11 else m.b(m.a(x))


@pytest.mark.parametrize(
    "run",
    [
        broadcast_channels,
        broadcast_pixels,
        other_input,
        features,
        of_the_channels,
        overwritten_later,
        result_overwritten,
        input_overwritten,
        read_twice,
        ceil,
        twice,
        unused,
        by_the_values,
        by_the_size,
        pooled,
    ],
    ids=lambda run: run.__name__,
)
def test_forwards_with_something_else_have_the_same_results(run: Any) -> None:
    model, frozen = frozen_of(type("Own", (Forward,), {"forward": run})(None))
    for shape in ((2, 3, 12, 10), (1, 3, 5, 7)):
        for sign in (1, -1):
            agrees(model, frozen, sign * image(*shape).abs())


def test_an_addition_that_may_broadcast_is_left_to_pytorch() -> None:
    """One pixel, or one channel, would be stretched."""
    for run in (broadcast_channels, broadcast_pixels):
        _, frozen = frozen_of(type("Own", (Forward,), {"forward": run})(None))
        plan: Plan = frozen.fused_resnet_plan
        assert all(step.residual < 0 for p in plan.programs for step in p.steps)


class Options(Forward):
    """Takes more than a tensor."""

    def forward(self, x: Tensor, y: Tensor | None = None, *, twice: bool = False) -> Any:
        h = self.b(self.a(x).relu())
        h = h if y is None else h + y
        return 2 * h if twice else h


def test_other_arguments() -> None:
    model, frozen = frozen_of(Options(None))
    x, y = image(2, 3, 8, 8), image(2, 4, 8, 8)
    agrees(model, frozen, x)
    agrees(model, frozen, x, y)
    agrees(model, frozen, x, twice=True)
    agrees(model, frozen, x, twice=False)
    agrees(model, frozen, x, y=y, twice=True)


class TwoTensors(Forward):
    """A decoder's block: a map and the one that it is added to."""

    def forward(self, x: Tensor, skip: Tensor) -> Any:
        return (self.b(self.a(x)) + skip).relu(), self.c(skip)


def test_two_tensors() -> None:
    model, frozen = frozen_of(TwoTensors(None))
    x, skip = image(2, 3, 8, 8), image(2, 4, 8, 8)
    agrees(model, frozen, x, skip)
    agrees(model, frozen, x, skip=skip)
    assert [p["conv"] for p in programs_of(frozen)] == [2, 1]


def test_a_module_with_a_hook_is_called() -> None:
    model = randomize(fr.resnet18(num_classes=5)).eval()
    seen: list[Any] = []
    model.layer2.register_forward_hook(lambda module, args, y: seen.append(y))
    frozen = fr.freeze(model)
    assert [program["conv"] for program in programs_of(frozen)] == [4, 10]
    assert isinstance(frozen.layer2, Lowered)
    report = fr.report(frozen)
    assert report.programs == [("FrozenResNet", 5), ("FrozenResNet", 12), ("layer2", 5)]
    assert report.summary().endswith("; 3 programs of 22 steps")
    x = image(2, 3, 64, 64, dtype=torch.float32)
    frozen(x)
    assert torch.equal(seen[0], frozen.layer2(frozen.layer1(stem(frozen, x))))


def stem(frozen: Any, x: Tensor) -> Tensor:
    return frozen.maxpool(frozen.relu(frozen.bn1(frozen.conv1(x))))


def test_parts_have_the_bits_of_the_whole() -> None:
    frozen = fr.freeze(randomize(fr.resnet18(num_classes=5)).eval())
    x = image(3, 3, 64, 64, dtype=torch.float32)
    h = stem(frozen, x)
    for stage in (frozen.layer1, frozen.layer2, frozen.layer3, frozen.layer4):
        by_blocks = h
        for block in stage:
            by_blocks = block(by_blocks)
        h = stage(h)
        assert torch.equal(h, by_blocks)
    y = frozen.fc(torch.flatten(frozen.avgpool(h), 1))
    assert torch.equal(frozen(x), y)


@pytest.mark.parametrize("kind", [nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Linear])
def test_a_layer_whose_class_was_patched_is_called(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.drop(m.flatten(m.average(m.a(x)))))

    model = type("Own", (Forward,), {"forward": run})(None)
    model.flatten = nn.Flatten()
    agrees(*frozen_of(model), image(2, 3, 8, 8))
