"""Activations from end to end: the argument, modules, and networks with LeakyReLU instead of ReLU.

Kernel by kernel they are tested in tests/conformance and tests/training.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from tolerances import error
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import ops
from fused_resnet.backends.activation import LEAKY_SLOPE, Activation, choose
from fused_resnet.fusion.report import programs_of

NAMES = ("none", "relu", "leaky_relu")


# The argument


def test_the_shorthand_and_the_names() -> None:
    assert [choose("op", True, name).name.lower() for name in NAMES] == list(NAMES)
    assert choose("op", True, None) is Activation.RELU
    assert choose("op", False, None) is choose("op", False, "none") is Activation.NONE
    for name in NAMES[1:]:
        with pytest.raises(ValueError, match=rf"op: relu: expected True beside .*'{name}', got Fa"):
            choose("op", False, name)
    for wrong in ("gelu", ""):
        with pytest.raises(ValueError, match="op: activation: expected None or one of none, relu,"):
            choose("op", True, wrong)


def test_operators_refuse_unknown_numbers() -> None:
    x, one = torch.randn(1, 2, 3, 3), torch.ones(2)
    for number in (-1, len(NAMES)):
        with pytest.raises(
            ValueError, match=f"activation: expected an int from 0 to 2, got {number}"
        ):
            torch.ops.fused_resnet.block_end(x, one, one, None, None, None, number)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_functions(name, training) -> None:
    """Values and gradients of the three live functions, by PyTorch's own in float64."""
    act = {"none": lambda y: y, "relu": F.relu, "leaky_relu": F.leaky_relu}[name]
    x, r = image(3, 4, 7, 6), image(3, 5, 7, 6, seed=7)
    weight = image(5, 4, 3, 3, seed=5)
    bn = [image(5, seed=8), image(5, seed=9), torch.zeros(5).double(), torch.ones(5).double()]

    def norm(z: Tensor, bn: list[Tensor]) -> Tensor:
        running = [t.clone() for t in bn[2:]]
        return F.batch_norm(z, *running, *bn[:2], training)

    def unfused(x, weight, r, gamma, beta):
        z = norm(F.conv2d(x, weight, padding=1), [gamma, beta, *bn[2:]])
        return act(norm(r, [gamma, beta, *bn[2:]]) + z), F.max_pool2d(act(z), 3, 2, 1)

    def fused(x, weight, r, gamma, beta):
        def running():
            return [t.clone() for t in bn[2:]]

        shared = {"training": training, "activation": name}
        z = ops.conv_bn_add_relu(
            x, weight, gamma, beta, *running(), padding=1, training=training, activation="none"
        )
        y = ops.bn_add_relu(r, gamma, beta, *running(), z, **shared)
        pooled = ops.conv_bn_relu_maxpool(
            x, weight, gamma, beta, *running(), stride=1, padding=1, **shared
        )
        return y, pooled

    outcomes = []
    for run in (fused, unfused):
        leaves = [t.clone().requires_grad_() for t in (x, weight, r, *bn[:2])]
        y = run(*leaves)
        sum((v * image(*v.shape, seed=3)).sum() for v in y).backward()
        outcomes.append({str(i): t.detach() for i, t in enumerate((*y, *(v.grad for v in leaves)))})
    assert_same(*outcomes)


# Modules of fr.nn


@pytest.mark.parametrize("name", [None, *NAMES])
def test_modules(name) -> None:
    act = {"none": nn.Identity(), "leaky_relu": nn.LeakyReLU()}.get(name, nn.ReLU())
    torch.manual_seed(0)
    conv = fr.nn.ConvBNReLU2d(4, 4, 3, padding=1, activation=name)
    add = fr.nn.ConvBNAddReLU2d(4, 4, 3, padding=1, activation=name)
    norm = fr.nn.BNAddReLU2d(4, activation=name)
    stem = fr.nn.Stem(4, 4, activation=name)
    basic = fr.nn.BasicBlock(4, 4, activation=name)
    bottleneck = fr.nn.Bottleneck(4, 1, activation=name)
    modules = [conv, add, norm, stem, basic, bottleneck]
    for module in modules:
        randomize(module).double().train()
    copies = pickle.loads(pickle.dumps(modules))

    def plain(m: nn.Module, x: Tensor) -> Tensor:
        if m is norm:
            return act(F.batch_norm(x, None, None, norm.weight, norm.bias, True) + x)
        if m in (conv, add):
            z = F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, True)
            return act(z + x if m is add else z)
        if m is stem:
            z = F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, True)
            return m.pool(act(z))
        h = x
        count = 3 if m is bottleneck else 2
        for i in range(1, count + 1):
            bn = getattr(m, f"bn{i}")
            h = F.batch_norm(getattr(m, f"conv{i}")(h), None, None, bn.weight, bn.bias, True)
            h = act(h + x if i == count else h)
        return h

    x = image(3, 4, 13, 11)
    for module, copied in zip(modules, copies, strict=True):
        expected = plain(module, x)
        more = (x,) if module in (add, norm) else ()
        for m in (module, copied):
            torch.testing.assert_close(m(x, *more), expected, rtol=1e-9, atol=1e-9)
    words = repr(conv), repr(norm)
    assert all(("activation=" in w) is (name in ("none", "leaky_relu")) for w in words)


def test_a_module_refuses_an_unknown_activation() -> None:
    for make in (fr.nn.ConvBNReLU2d, fr.nn.BasicBlock, fr.nn.Stem):
        with pytest.raises(ValueError, match=rf"{make.__name__}: activation: expected None or one"):
            make(3, 4, 3, activation="mish")


# Networks of PyTorch's modules


class Block(nn.Module):
    """torchvision's basic block or bottleneck with any activation."""

    def __init__(self, inner: list[int], sizes: list[int], stride: int, act: nn.Module) -> None:
        super().__init__()
        self.count = len(sizes)
        for i, size in enumerate(sizes):
            step = stride if size == 3 and (i == 0 or self.count == 3) else 1
            conv = nn.Conv2d(inner[i], inner[i + 1], size, step, size // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(inner[i + 1]))
        self.relu = act
        self.downsample = None
        if stride != 1 or inner[0] != inner[-1]:
            conv = nn.Conv2d(inner[0], inner[-1], 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(inner[-1]))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i in range(1, self.count + 1):
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            if i < self.count:
                h = self.relu(h)
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class SmallResNet(nn.Module):
    """A stem, two basic blocks, two bottlenecks and a head."""

    def __init__(self, slope: float | None = LEAKY_SLOPE) -> None:
        super().__init__()

        def act() -> nn.Module:
            return nn.ReLU(inplace=True) if slope is None else nn.LeakyReLU(slope, inplace=True)

        conv = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(16), act(), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.Sequential(
            Block([16, 16, 16], [3, 3], 1, act()),
            Block([16, 32, 32], [3, 3], 2, act()),
            Block([32, 16, 16, 64], [1, 3, 1], 2, act()),
            Block([64, 16, 16, 64], [1, 3, 1], 1, act()),
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def network(slope: float | None = LEAKY_SLOPE, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return randomize(SmallResNet(slope)).to(dtype).eval()


X = (4, 3, 65, 61)


def test_a_network_trains_as_unfused() -> None:
    eager = network()
    fused = fr.fuse(copy.deepcopy(eager))
    for mode in (True, False):
        for x in (image(*X), image(*X).contiguous(memory_format=torch.channels_last)):
            assert_same(results(fused.train(mode), x), results(eager.train(mode), x))


def test_its_report_is_that_of_a_network_with_relu() -> None:
    leaky, relu = (fr.report(fr.fuse(network(slope))) for slope in (LEAKY_SLOPE, None))
    assert dict(leaky.fused) == dict(relu.fused)
    assert list(leaky.left) == list(relu.left) == []


def test_its_blocks_are_units_of_training() -> None:
    fused = fr.fuse(network()).train()
    decisions = [m.training_decision() for m in fused.modules() if hasattr(m, "training_decision")]
    found = [d for d in decisions if d is not None]
    assert [d.operation for d in found] == ["residual_block"] * 4
    assert {d.activation for d in found} == {Activation.LEAKY_RELU}


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "library"])
def test_a_frozen_network(backend) -> None:
    eager = network()
    frozen = fr.freeze(copy.deepcopy(eager))
    x = image(*X)
    with torch.no_grad(), fr.use_backend(backend):
        torch.testing.assert_close(frozen(x), eager(x), rtol=1e-9, atol=1e-9)
    (program,) = [program for _, program in programs_of(frozen)]
    kinds = {(step.operation, step.activation.name) for step in program.steps}
    assert kinds == {
        ("conv_max_pool", "LEAKY_RELU"), ("conv", "LEAKY_RELU"), ("conv", "NONE"),
        ("global_avg_pool", "NONE"), ("linear", "NONE"),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frozen_network_is_as_exact_as_pytorch(dtype) -> None:
    """All of Winograd's and of the direct kernels: 64 channels at 16 pixels a side."""
    model, x = network(), image(*X)
    with torch.no_grad():
        truth = model(x)
        eager = copy.deepcopy(model).to(dtype)(x.to(dtype))
        frozen = fr.freeze(copy.deepcopy(model).float(), dtype=dtype)(x.to(dtype))
    assert frozen.dtype is dtype
    assert error(frozen, truth) <= max(1.5 * error(eager, truth), 5e-6)


def test_a_frozen_network_is_exported_and_saved() -> None:
    frozen, x = fr.freeze(network(dtype=torch.float32)), image(*X, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(frozen, (x,))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("fused_resnet_export.run_program" in name for name in names)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        torch.testing.assert_close(again(x), frozen(x), rtol=1e-5, atol=1e-5)
        copied = pickle.loads(pickle.dumps(frozen))
        assert torch.equal(copied(x), frozen(x))


@pytest.mark.thorough
def test_a_compiled_network() -> None:
    """Training and frozen, traced without a break."""
    eager = network()
    fused, x = fr.fuse(copy.deepcopy(eager)).train(), image(*X)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager.train()(x), rtol=1e-9, atol=1e-9)
    frozen = torch.compile(fr.freeze(network()), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), network()(x), rtol=1e-9, atol=1e-9)


# What is not fused


def test_another_slope_is_left_and_reported() -> None:
    eager = network(0.2)
    fused = fr.fuse(copy.deepcopy(eager))
    assert_same(results(fused.train(), image(*X)), results(eager.train(), image(*X)))
    left = dict(fr.report(fused).left)
    assert len(left) == 5
    assert set(left.values()) == {"a LeakyReLU with a slope of 0.2; only 0.01 is fused"}
    assert {path.rpartition(".")[2] for path in left} == {"relu", "2"}
    with torch.no_grad():
        frozen = fr.freeze(copy.deepcopy(eager.eval()))
        torch.testing.assert_close(frozen(image(*X)), eager(image(*X)), rtol=1e-9, atol=1e-9)


class TwoActivations(nn.Module):
    """A basic block with another activation at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act1, self.act2 = nn.ReLU(), nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + x)


def test_a_block_of_two_activations() -> None:
    eager = randomize(TwoActivations()).double()
    fused, x = fr.fuse(copy.deepcopy(eager)), image(2, 8, 7, 6)
    assert fused.training_decision().reason == "its activations are not the same"
    assert_same(results(fused.train(), x), results(eager.train(), x))
    with torch.no_grad():
        frozen = fr.freeze(copy.deepcopy(eager.eval()))
        torch.testing.assert_close(frozen(x), eager(x), rtol=1e-9, atol=1e-9)


def test_a_slope_that_changes_after_fuse_takes_effect() -> None:
    eager = network()
    fused = fr.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        model.layers[1].relu.negative_slope = 0.3
    assert_same(results(fused.train(), image(*X)), results(eager.train(), image(*X)))


def test_a_hook_on_the_activation() -> None:
    eager = network()
    fused = fr.fuse(copy.deepcopy(eager))
    seen: list[float] = []
    for model in (eager, fused):
        model.layers[1].relu.register_forward_hook(lambda *a: seen.append(a[-1].sum().item()))
    assert_same(results(fused.train(), image(*X)), results(eager.train(), image(*X)))
    assert len(seen) == 4


class Function(nn.Module):
    """An activation as a function."""

    def __init__(self, call) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.bn(self.conv(x)))


CALLS = {
    "default": (lambda y: F.leaky_relu(y), Activation.LEAKY_RELU),
    "slope": (lambda y: F.leaky_relu(y, 0.01, True), Activation.LEAKY_RELU),
    "keyword": (lambda y: F.leaky_relu(y, negative_slope=0.01), Activation.LEAKY_RELU),
    "another slope": (lambda y: F.leaky_relu(y, 0.1), Activation.NONE),
    "another keyword": (lambda y: F.leaky_relu(y, negative_slope=0.1), Activation.NONE),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_in_a_forward(name) -> None:
    call, activation = CALLS[name]
    model = randomize(Function(call)).double()
    fused, x = fr.fuse(copy.deepcopy(model)), image(2, 4, 7, 6)
    (group,) = fused.fused_groups()
    assert (group.operation, group.activation) == ("conv_bn_add_relu", activation)
    assert_same(results(fused.train(), x), results(model.train(), x))
    with torch.no_grad():
        frozen = fr.freeze(copy.deepcopy(model.eval()))
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
