"""Frozen blocks in a row run without being called, as long as nobody could tell."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import image, in_threads, randomize
from operator_calls import OperatorCalls
from torch import nn

import fused_resnet as fr
from fused_resnet.inference.frozen_block import FrozenBlock, separate_convolutions
from fused_resnet.inference.segment import FrozenSegment
from fused_resnet.models.cifar import PadShortcut
from fused_resnet.ops import dispatch as choice
from fused_resnet.tuning import tuner


def operators(model, x):
    """The result of a call, and how often it called which operator."""
    with torch.no_grad(), OperatorCalls() as ran:
        y = model(x)
    return y, ran.counts("fused_resnet")


@pytest.fixture
def called(monkeypatch):
    """Grows by the block at each call of a whole block as a module."""
    blocks: list[nn.Module] = []
    forward = FrozenBlock.forward

    def noted(self, *args, **kwargs):
        blocks.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FrozenBlock, "forward", noted)
    return blocks


def live(shortcut: str) -> nn.Module:
    """Three stages of three blocks."""
    torch.manual_seed(0)
    return randomize(fr.cifar_resnet(20, shortcut=shortcut)).eval()


def network(shortcut: str = "B", dtype: torch.dtype | None = None) -> nn.Module:
    """The same, frozen."""
    return fr.freeze(live(shortcut), dtype)


def x_of(batch: int = 2, size: int = 16) -> torch.Tensor:
    return image(batch, 3, size, size, dtype=torch.float32)


def stage_and_map(shortcut: str = "B") -> tuple[nn.Module, torch.Tensor]:
    """The second stage of a network, and what goes in."""
    x = image(2, 16, 16, 16, dtype=torch.float32).relu()
    return network(shortcut).layer2, x.contiguous(memory_format=torch.channels_last)


def child_by_child(row, x):
    with torch.no_grad():
        for child in row:
            x = child(x)
    return x


# What a row runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_row_gives_the_bits_of_its_blocks(called, dtype, batch):
    frozen = network(dtype=dtype)
    for row in (frozen.layer1, frozen.layer2, frozen.layer3):
        x = image(batch, row[0].conv1.in_channels, 9, 7, dtype=dtype)
        y, calls = operators(row, x)
        assert calls == {"residual_block": 3}
        assert called == []
        assert torch.equal(y, child_by_child(row, x))
        assert len(called) == 3
        called.clear()


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_stage_is_one_operation(called, shortcut):
    """Shortcuts that pad with zeros among them."""
    frozen, x = network(shortcut), x_of()
    with torch.no_grad(), OperatorCalls() as ran:
        y = frozen(x)
    assert called == []
    assert ran.rows == [3, 3, 3]
    assert ran.counts("fused_resnet") == {"residual_block": 9, "conv_bn_add_relu_packed": 1}
    with torch.no_grad():
        torch.testing.assert_close(y, live(shortcut)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.shortcut, "stride", 1),
        lambda block: setattr(block.shortcut, "padding", 0),
        lambda block: block.shortcut.register_forward_hook(double),
        lambda block: setattr(block, "shortcut", PadShortcut(1, 8)),
    ],
    ids=["stride", "padding", "hook", "replaced"],
)
def test_a_change_of_a_shortcut_that_pads_counts(change):
    """Another size no longer fits the addition, as in the block's own forward."""
    row, x = stage_and_map("A")
    with torch.no_grad():
        before = row(x)
        change(row[0])
        try:
            expected = child_by_child(row, x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                row(x)
        else:
            torch.testing.assert_close(row(x), expected, rtol=1e-5, atol=1e-5)
            assert not torch.equal(expected, before)


def test_a_module_between_blocks_and_one_that_comes_twice(called):
    frozen = network()
    block, relu6 = frozen.layer1[1], nn.ReLU6()
    frozen.layer1[1] = relu6
    frozen.layer1.append(block).append(block)
    x = image(2, 16, 8, 8, dtype=torch.float32)
    with torch.no_grad(), OperatorCalls() as ran:
        y = frozen.layer1(x)
    assert ran.rows == [1, 3]
    assert called == []
    assert torch.equal(y, child_by_child(frozen.layer1, x))


def test_a_row_that_is_all_of_the_model(called):
    torch.manual_seed(0)
    model = randomize(nn.Sequential(fr.nn.BasicBlock(8, 8), fr.nn.BasicBlock(8, 8))).eval()
    frozen, x = fr.freeze(model), image(2, 8, 9, 9, dtype=torch.float32)
    y, calls = operators(frozen, x)
    assert (calls, called) == ({"residual_block": 2}, [])
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


class Backwards(nn.Sequential):
    def forward(self, input):
        for module in reversed(list(self)):
            input = module(input)
        return input


class Once(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[:1])


@pytest.mark.parametrize("kind", [Backwards, Once])
def test_a_sequence_of_somebody_elses_is_none(kind):
    torch.manual_seed(0)
    model = randomize(kind(*(fr.nn.BasicBlock(8, 8) for _ in range(3)))).eval()
    frozen, x = fr.freeze(model), image(2, 8, 9, 9, dtype=torch.float32)
    assert not isinstance(frozen, FrozenSegment)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


# Changes after the first call


def double(module, args, y):
    return y * 2


def replace_conv(row):
    row[1].conv2 = copy.deepcopy(row[1].conv2)
    row[1].conv2.scale.mul_(2)


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments) * 2


def load_weight(row):
    state = row[1].conv1.state_dict()
    row[1].conv1.load_state_dict({**state, "weight": state["weight"] * 2})


def compile_in_place(row):
    row[1]._compiled_call_impl = lambda x: x * 2  # what nn.Module.compile sets


CHANGES = {
    "hook on a block": lambda row: row[1].register_forward_hook(double),
    "pre-hook on a block": lambda row: row[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 2,)
    ),
    "hook on a convolution": lambda row: row[1].conv2.register_forward_hook(double),
    "hook in a shortcut": lambda row: row[0].shortcut[0].register_forward_hook(double),
    "hook on the row": lambda row: row.register_forward_hook(double),
    "convolution": replace_conv,
    "scale": lambda row: setattr(row[2].conv2, "scale", row[2].conv2.scale * 2),
    "scale in place": lambda row: row[2].conv2.scale.mul_(2),
    "activation": lambda row: setattr(row[0], "relu", nn.Hardtanh(0.0, 0.1)),
    "forward of a block": lambda row: replace_forward(row[1]),
    "forward of a convolution": lambda row: replace_forward(row[1].conv1),
    "weight": load_weight,
    "shortcut": lambda row: setattr(row[1], "shortcut", nn.Hardtanh()),
    "a setting of the block": lambda row: setattr(row[1], "residual", False),
    "a block compiled": compile_in_place,
    "child replaced": lambda row: row.__setitem__(1, nn.Sigmoid()),
    "child replaced by a block": lambda row: row.__setitem__(1, copy.deepcopy(row[2])),
    "child appended": lambda row: row.append(copy.deepcopy(row[2])),
    "child deleted": lambda row: row.__delitem__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_counts(change):
    """Against the blocks' own forwards, called one by one, which read their modules."""
    row, x = stage_and_map()
    with torch.no_grad():
        before = row(x)
        assert torch.equal(row(x), before)
        CHANGES[change](row)
        after = row(x)
        assert not torch.equal(after, before)
        assert torch.equal(row(x), after)
        with separate_convolutions(row):
            torch.testing.assert_close(after, row(x), rtol=1e-5, atol=1e-5)


def test_a_block_frozen_by_itself_keeps_its_conversions(called):
    row, x = stage_and_map()
    row(x)
    torch.manual_seed(3)
    alone = fr.freeze(randomize(fr.nn.BasicBlock(32, 32)).eval(), torch.bfloat16)
    row[1] = alone
    y, calls = operators(row, x)
    assert calls == {"residual_block": 3}
    assert called == [alone]
    assert torch.equal(y, child_by_child(row, x))


def test_a_hook_sees_what_its_block_takes_and_gives(called):
    row, x = stage_and_map()
    expected = row(x)
    seen = []
    handle = row[1].register_forward_hook(lambda module, args, y: seen.append((*args, y)))
    assert torch.equal(row(x), expected)
    handle.remove()
    called.clear()
    assert torch.equal(row(x), expected)
    assert called == []
    (given, result), first = seen[0], row[0](x)
    assert len(seen) == 1
    assert torch.equal(given, first)
    assert torch.equal(result, row[1](first))


def test_global_hooks_see_the_blocks():
    row, x = stage_and_map()
    row(x)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        row(x)
    finally:
        handle.remove()
    assert all(block in seen and block.conv2 in seen for block in row)


def test_one_block_by_its_convolutions(called):
    """Asked for one block, or for all of a network."""
    row, x = stage_and_map()
    expected = row(x)
    for inside, blocks in ((row[1], 2), (row, 0)):
        with separate_convolutions(inside):
            y, calls = operators(row, x)
        assert calls.get("residual_block", 0) == blocks
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    called.clear()
    assert torch.equal(row(x), expected)
    assert called == []


# What a row leaves to its blocks


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_another_backend(called, backend):
    row, x = stage_and_map()
    expected = row(x)
    with fr.use_backend(backend):
        y, calls = operators(row, x)
    assert "residual_block" not in calls
    assert len(called) == 3
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    called.clear()
    with fr.use_backend("cpu"):
        assert torch.equal(row(x), expected)
    assert called == []


def test_each_block_chooses_where_there_is_a_choice(monkeypatch, called):
    row, x = stage_and_map()
    row(x)
    operators_of = {"cpu": torch.ops.fused_resnet, "library": torch.ops.fused_resnet}
    monkeypatch.setattr(choice, "candidates", lambda op, backend: operators_of)
    with tuner.recording() as calls:
        row(x)
    assert [call.op for call in calls] == ["residual_block"] * 3
    assert len(called) == 3


def test_a_wrong_input_is_refused_as_by_a_block():
    row, _ = stage_and_map()
    for wrong in (torch.zeros(1, 17, 8, 8), torch.zeros(16, 8, 8), torch.zeros(1, 16, 8, 8).long()):
        with pytest.raises((ValueError, TypeError)) as by_block:
            child_by_child(row, wrong)
        with pytest.raises(by_block.type) as by_row:
            row(wrong)
        assert str(by_row.value) == str(by_block.value)
    with pytest.raises(TypeError):
        row()


def test_a_torch_fx_trace_has_the_blocks():
    row, x = stage_and_map()
    expected = row(x)

    class Blocks(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FrozenBlock)

    graph = Blocks().trace(row)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(torch.fx.GraphModule(row, graph)(x), expected)


def test_a_jit_trace_calls_the_blocks(called):
    row, x = stage_and_map()
    expected = row(x)
    traced = torch.jit.trace(row, x, check_trace=False)
    assert called == list(row)
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("first", ["called before", "not called before"])
def test_compile_and_export(called, first):
    frozen, x = network(), x_of()
    if first == "called before":
        frozen(x)
    exported = torch.export.export(frozen, (x,))
    # The part without a gradient is a graph inside of the graph.
    parts = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for part in parts for node in part.graph.nodes]
    assert sum("fused_resnet_export.residual_block" in target for target in targets) == 9
    assert ("_frozen_cache" in frozen.layer2.__dict__) == (first == "called before")
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def noting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(frozen, fullgraph=True, backend=noting)
    y = compiled(x)
    assert sum("residual_block" in str(node.target) for node in graphs[0].graph.nodes) == 9
    expected = frozen(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


# Copies and threads


def test_a_row_is_not_copied():
    row, x = stage_and_map()
    y = row(x)
    assert "_frozen_cache" in row.__dict__
    for other in (copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert isinstance(other, FrozenSegment)
        assert "_frozen_cache" not in other.__dict__
        assert torch.equal(other(x), y)
        other[1].conv1.scale.mul_(2)
        assert not torch.equal(other(x), y)
        assert torch.equal(row(x), y)


def test_a_replica_runs_its_own_blocks():
    """As ``nn.DataParallel`` makes it, of a row that has been called."""
    row, x = stage_and_map()
    y = row(x)
    replica = row._replicate_for_data_parallel()
    del replica[1]
    assert torch.equal(replica(x), row[2](row[0](x)))
    assert torch.equal(row(x), y)


def test_two_threads_at_once():
    """One row, two threads, sizes that change, and a hook that one of them puts on and off."""
    row, _ = stage_and_map()
    maps = [image(n, 16, size, size, dtype=torch.float32) for n, size in ((1, 16), (3, 9), (2, 5))]
    expected = [row(x) for x in maps]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(60):
            at = (first + i) % len(maps)
            if not torch.equal(row(maps[at]), expected[at]):
                wrong.append(at)
            if first:
                row[1].register_forward_hook(lambda module, args, y: None).remove()
                row.__dict__.pop("_frozen_cache", None)

    in_threads(work, 0, 1)
    assert wrong == []
