"""Blocks and stages of other libraries run the same operations as torchvision's."""

from __future__ import annotations

import pytest
import torch
from networks import assert_same, image, randomize
from operator_calls import OperatorCalls
from torch import nn

import fused_resnet as fr
from fused_resnet.inference.lowered import Lowered

#: Operators that a fused network should not call.
PIECES = ("aten::convolution", "aten::add.Tensor", "aten::add_.Tensor", "aten::relu_")


#: Steps of a program that are PyTorch's operators elsewhere.
HEAD = ("fused_resnet::global_avg_pool", "fused_resnet::linear")


def is_counted(name):
    return (name.startswith("fused_resnet::") and name not in HEAD) or name in PIECES


def counted(model, x):
    """The result of a call, and the operations that it made."""
    with torch.no_grad(), OperatorCalls(is_counted) as ran:
        y = model(x)
    return y, ran.counts()


class Logits(nn.Module):
    def __init__(self, model, return_dict):
        super().__init__()
        self.model, self.return_dict = model, return_dict

    def forward(self, x):
        result = self.model(x, return_dict=self.return_dict)
        return result.logits if self.return_dict else result[0]


def of_torchvision(depth):
    library = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return getattr(library.models, f"resnet{depth}")()


def of_timm(depth):
    library = pytest.importorskip("timm", reason="timm is not installed")
    return library.create_model(f"resnet{depth}", pretrained=False)


def of_transformers(depth, return_dict=False):
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, depths, widths = {
        18: ("basic", [2, 2, 2, 2], [64, 128, 256, 512]),
        50: ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048]),
    }[depth]
    config = library.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths)
    return Logits(library.ResNetForImageClassification(config), return_dict)


SOURCES = {
    "torchvision": of_torchvision,
    "timm": of_timm,
    "transformers": of_transformers,
    "transformers, return_dict": lambda depth: of_transformers(depth, True),
}


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("source", SOURCES)
def test_every_library_runs_the_same_operations(source, depth):
    torch.manual_seed(0)
    model = randomize(SOURCES[source](depth)).double().eval()
    x = image(2, 3, 64, 64)
    y, calls = counted(fr.freeze(model), x)
    assert calls == {"conv_bn_relu_maxpool_packed": 1, "residual_block": {18: 8, 50: 16}[depth]}
    with torch.no_grad():
        assert_same({"y": y}, {"y": model(x)})


@pytest.mark.parametrize("source", SOURCES)
def test_every_library_has_large_programs(source):
    """One for the whole network; transformers' own code calls the stem and each stage."""
    torch.manual_seed(0)
    model = randomize(SOURCES[source](18)).double().eval()
    with torch.no_grad(), OperatorCalls() as ran:
        fr.freeze(model)(image(2, 3, 64, 64))
    stages = [count for count in ran.rows if count]
    assert stages == ([2, 2, 2, 2] if "transformers" in source else [8])


@pytest.mark.parametrize("source", ["timm", "transformers"])
@pytest.mark.parametrize("depth", [18, 50])
def test_fused_networks_run_the_same_operations(source, depth):
    torch.manual_seed(0)
    x = image(1, 3, 64, 64)
    ours = counted(fr.fuse(of_torchvision(depth).double().eval()), x)[1]
    model = randomize(SOURCES[source](depth)).double().eval()
    y, calls = counted(fr.fuse(model), x)
    assert calls == ours
    with torch.no_grad():
        assert_same({"y": y}, {"y": model(x)})


def test_hidden_states():
    torch.manual_seed(0)
    model = randomize(of_transformers(18).model).double().eval()
    x = image(5, 3, 64, 64)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True).hidden_states
    got = fr.freeze(model)(x, output_hidden_states=True).hidden_states
    assert_same(dict(enumerate(map(torch.Tensor.contiguous, got))), dict(enumerate(expected)))


def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """A bottleneck of no known library, in replaceable pieces; ``between`` is called too."""

    def __init__(self, width=8, between=None, inputs=16, stride=1):
        super().__init__()
        self.head = nn.Sequential(conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(True))
        self.conv, self.norm = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.between = between or nn.Identity()
        self.tail = nn.Sequential(conv(width, 16, 1), nn.BatchNorm2d(16))
        self.side = None
        if inputs != 16 or stride != 1:
            self.side = nn.Sequential(conv(inputs, 16, 1, stride), nn.BatchNorm2d(16))

    def forward(self, x):
        y = self.between(torch.relu(self.norm(self.conv(self.head(x)))))
        return self.end(self.tail(y), x if self.side is None else self.side(x))

    def end(self, y, side):
        return nn.functional.relu(y + side)


class Scaled(Block):
    def end(self, y, side):
        return nn.functional.relu(0.5 * y + side)


class NoLastReLU(Block):
    def end(self, y, side):
        return y + side


class ReLUBeforeTheAddition(Block):
    def end(self, y, side):
        return nn.functional.relu(y) + side


class TwoResults(Block):
    def end(self, y, side):
        return nn.functional.relu(y + side) + side


class DropPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = 0.5

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        return x * self.rate


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Two(nn.Module):
    """A network around the block, which gets half of the input's channels."""

    def __init__(self, block):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, block.head[0].in_channels, 3), block

    def forward(self, x):
        return self.block(self.stem(x)).sum((2, 3))


def frozen_of(block):
    torch.manual_seed(0)
    model = randomize(Two(block)).double().eval()
    return model, fr.freeze(model)


def blocks_run(model, frozen, x=None):
    """The number of blocks that are one operation; checks the results."""
    x = image(2, 3, 12, 12) if x is None else x
    y, calls = counted(frozen, x)
    with torch.no_grad():
        assert_same({"y": y}, {"y": model(x)})
    return calls.get("residual_block", 0)


@pytest.mark.parametrize("changed", [{}, {"stride": 2}, {"inputs": 24}], ids=str)
def test_a_block_of_no_library(changed):
    assert blocks_run(*frozen_of(Block(**changed))) == 1


RECOGNISED = {"drop-path in eval": DropPath, "placeholder": nn.Identity}
LEFT = {
    "squeeze-and-excite": lambda: Block(between=SqueezeExcite()),
    "blur": lambda: Block(between=nn.AvgPool2d(3, 1, 1)),
    "scaled": Scaled,
    "no ReLU at the end": NoLastReLU,
    "ReLU before the addition": ReLUBeforeTheAddition,
    "something behind it": TwoResults,
    # PyTorch's addition broadcasts one channel to sixteen.
    "a shortcut that is stretched": lambda: stretched(Block(inputs=24)),
}


def stretched(block):
    block.side = nn.Sequential(conv(24, 1, 1), nn.BatchNorm2d(1))
    return block


@pytest.mark.parametrize("name", RECOGNISED)
def test_modules_without_effect_are_skipped(name):
    model, frozen = frozen_of(Block(between=RECOGNISED[name]()))
    assert blocks_run(model, frozen) == 1


@pytest.mark.parametrize("name", LEFT)
def test_other_modules_are_not_blocks(name):
    """But the operation may be followed by something."""
    assert blocks_run(*frozen_of(LEFT[name]())) == (name == "something behind it")


def test_a_model_in_training_is_frozen_as_in_eval():
    model = randomize(Two(Block(between=DropPath()))).double().train()
    frozen = fr.freeze(model)
    assert blocks_run(model.eval(), frozen) == 1


def double(module, args, y):
    return y * 2


CHANGES = {
    # The hook sees a frozen convolution together with its batch norm, and changes nothing.
    "hook on a child": lambda b: b.conv.register_forward_hook(lambda module, args, y: None),
    "hook on a list of children": lambda b: b.head.register_forward_hook(double),
    "hook on a placeholder": lambda b: b.between.register_forward_hook(double),
    "another placeholder": lambda b: setattr(b, "between", nn.Hardtanh()),
    "a shortcut": lambda b: setattr(b, "side", nn.Hardtanh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_freezing_has_an_effect(change):
    torch.manual_seed(0)
    model = randomize(Two(Block(between=DropPath()))).double().eval()
    CHANGES[change](model.block)
    assert blocks_run(model, fr.freeze(model)) == 0


def test_a_call_by_keyword_runs_the_own_forward():
    model, frozen = frozen_of(Block())
    x = image(2, 16, 8, 8)
    with torch.no_grad():
        expected = model.block(x)
        for y in (frozen.block(x=x), frozen.block(x)):
            assert_same({"y": y.contiguous()}, {"y": expected})


class Batchwise(Block):
    """Depends on the whole batch."""

    def end(self, y, side):
        return nn.functional.relu(y + side) - side.mean(0, keepdim=True)


class Staged(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv, self.norm = conv(3, 16, 3), nn.BatchNorm2d(16)
        self.one, self.two = nn.Sequential(Block()), nn.Sequential(block)
        self.three, self.last = nn.Sequential(Block()), Block()

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(self.three(self.two(self.one(x))))


@pytest.mark.parametrize(("block", "programs"), [(Block, [4]), (Batchwise, [2, 2])])
def test_what_depends_on_the_batch_cuts_a_program(block, programs):
    torch.manual_seed(0)
    model = randomize(Staged(block())).double().eval()
    x = image(5, 3, 12, 12)
    frozen = fr.freeze(model)
    with torch.no_grad(), OperatorCalls() as ran:
        y = frozen(x)
    assert ran.rows == programs
    with torch.no_grad():
        assert_same({"y": y}, {"y": model(x)})


def test_batch_statistics_are_those_of_the_whole_batch():
    torch.manual_seed(0)

    def norm(channels):
        return nn.BatchNorm2d(channels, track_running_stats=False)

    model = fr.resnet18(norm_layer=norm, num_classes=10).double().eval()
    x = image(5, 3, 64, 64)
    with torch.no_grad():
        assert_same({"y": fr.freeze(model)(x)}, {"y": model(x)})


def test_a_frozen_block_exports_and_compiles():
    model, frozen = frozen_of(Block(between=DropPath()))
    x = image(2, 3, 12, 12)
    assert isinstance(frozen.block, Lowered)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(frozen, (x,)).module()
    with torch.no_grad():
        for run in (compiled, exported):
            assert_same({"y": run(x)}, {"y": model(x)})


class Beside(nn.Module):
    """Adds to a block's result: its trace includes the block, and calls the block's shortcut."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Block(inputs=8))
        self.other = nn.Sequential(conv(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(True))

    def forward(self, x):
        return self.block(x) + self.other(x)


def test_the_report_of_a_block_that_is_traced_with_its_parent():
    model = fr.fuse(Beside().eval())
    report = fr.report(model)
    assert report.left == []
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert len(report.fused) == norms
