"""A frozen module runs as few operators, with the bits of its modules called one by one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import image, in_threads, randomize
from operator_calls import OperatorCalls
from torch import nn

import fused_resnet as fr
from fused_resnet.inference.lowered import Lowered
from fused_resnet.inference.run_steps import separate_operations


def operators(model, x):
    """The result of a call, and how often it called which operator."""
    with torch.no_grad(), OperatorCalls() as ran:
        y = model(x)
    return y, ran.counts("fused_resnet")


def live(shortcut: str) -> nn.Module:
    """Three stages of three blocks."""
    torch.manual_seed(0)
    return randomize(fr.cifar_resnet(20, shortcut=shortcut)).eval()


def network(shortcut: str = "B", dtype: torch.dtype | None = None) -> nn.Module:
    """The network, frozen."""
    return fr.freeze(live(shortcut), dtype)


def x_of(batch: int = 2, size: int = 16) -> torch.Tensor:
    return image(batch, 3, size, size, dtype=torch.float32)


def stage_and_map(shortcut: str = "B") -> tuple[nn.Module, torch.Tensor]:
    """The second stage of a network, and an input of it."""
    x = image(2, 16, 16, 16, dtype=torch.float32).relu()
    return network(shortcut).layer2, x.contiguous(memory_format=torch.channels_last)


def child_by_child(segment, x):
    with torch.no_grad():
        for child in segment:
            x = child(x)
    return x


# The operators of a segment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_stage_has_the_bits_of_its_blocks(dtype, batch):
    frozen = network(dtype=dtype)
    for stage in (frozen.layer1, frozen.layer2, frozen.layer3):
        x = image(batch, stage[0].conv1.in_channels, 9, 7, dtype=dtype)
        with torch.no_grad(), OperatorCalls() as ran:
            y = stage(x)
        assert ran.rows == [3]
        with OperatorCalls() as ran:
            assert torch.equal(y, child_by_child(stage, x))
        assert ran.rows == [1, 1, 1]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_network_is_one_program(shortcut):
    """Also with zero-padded shortcuts."""
    frozen, x = network(shortcut), x_of()
    with torch.no_grad(), OperatorCalls() as ran:
        y = frozen(x)
    assert ran.rows == [9]
    counts = ran.counts("fused_resnet")
    assert counts.pop("residual_block") == 9
    assert counts == {"conv_bn_add_relu_packed": 1, "global_avg_pool": 1, "linear": 1}
    with torch.no_grad():
        torch.testing.assert_close(y, live(shortcut)(x), rtol=1e-4, atol=1e-4)


def test_another_module_between_blocks_and_a_repeated_block():
    model = live("B")
    block = model.layer1[1]
    model.layer1[1] = nn.ReLU6()
    model.layer1.append(block).append(block)
    frozen = fr.freeze(model)
    x = image(2, 16, 8, 8, dtype=torch.float32)
    with torch.no_grad(), OperatorCalls() as ran:
        y = frozen.layer1(x)
    assert ran.rows == [1, 3]
    assert torch.equal(y, child_by_child(frozen.layer1, x))


def test_a_model_that_is_one_program():
    torch.manual_seed(0)
    model = randomize(nn.Sequential(fr.nn.BasicBlock(8, 8), fr.nn.BasicBlock(8, 8))).eval()
    frozen, x = fr.freeze(model), image(2, 8, 9, 9, dtype=torch.float32)
    y, calls = operators(frozen, x)
    assert calls == {"residual_block": 2}
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
def test_a_subclass_of_sequential_runs_its_own_code(kind):
    torch.manual_seed(0)
    model = randomize(kind(*(fr.nn.BasicBlock(8, 8) for _ in range(3)))).eval()
    frozen, x = fr.freeze(model), image(2, 8, 9, 9, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


# What may change after the first call


def load_weight(segment):
    state = segment[1].conv1.state_dict()
    segment[1].conv1.load_state_dict({**state, "weight": state["weight"] * 2})


CHANGES = {
    "scale in place": lambda segment: segment[2].conv2.scale.mul_(2),
    "weight": load_weight,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_has_an_effect(change):
    """The truth is the blocks' own forwards, which read their modules at every call."""
    segment, x = stage_and_map()
    with torch.no_grad():
        before = segment(x)
        assert torch.equal(segment(x), before)
        CHANGES[change](segment)
        after = segment(x)
        assert not torch.equal(after, before)
        assert torch.equal(segment(x), after)
        with separate_operations():
            torch.testing.assert_close(after, segment(x), rtol=1e-5, atol=1e-5)


def double(module, args, y):
    return y * 2


@pytest.mark.parametrize("inside", ["1", "1.conv2", "0.shortcut.0"])
def test_a_hook_from_before_has_an_effect(inside):
    x = image(2, 16, 16, 16, dtype=torch.float32).relu()
    model = live("B")
    model.layer2.get_submodule(inside).register_forward_hook(double)
    with torch.no_grad():
        expected = model.layer2(x)
    segment = fr.freeze(model).layer2
    torch.testing.assert_close(segment(x), expected, rtol=1e-5, atol=1e-5)


def test_global_hooks_see_the_blocks():
    segment, x = stage_and_map()
    segment(x)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        segment(x)
    finally:
        handle.remove()
    assert all(block in seen and block.conv2 in seen for block in segment)


def test_separate_operations():
    segment, x = stage_and_map()
    expected = segment(x)
    with separate_operations():
        y, calls = operators(segment, x)
    assert calls == {"conv_bn_add_relu_packed": 7}
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(segment(x), expected)


# Calls for which the blocks' modules run


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_another_backend(backend):
    segment, x = stage_and_map()
    expected = segment(x)
    with fr.use_backend(backend):
        y, calls = operators(segment, x)
    assert "residual_block" not in calls
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with fr.use_backend("cpu"):
        assert torch.equal(segment(x), expected)


def test_a_wrong_input_raises_the_error_of_a_block():
    segment, _ = stage_and_map()
    for wrong in (torch.zeros(1, 17, 8, 8), torch.zeros(16, 8, 8), torch.zeros(1, 16, 8, 8).long()):
        with pytest.raises((ValueError, TypeError)) as by_block:
            child_by_child(segment, wrong)
        with pytest.raises(by_block.type) as by_segment:
            segment(wrong)
        assert str(by_segment.value) == str(by_block.value)
    with pytest.raises(TypeError):
        segment()


def test_a_torch_fx_trace_has_the_blocks():
    segment, x = stage_and_map()
    expected = segment(x)

    class Blocks(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, fr.models.cifar.CifarBlock)

    graph = Blocks().trace(segment)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(torch.fx.GraphModule(segment, graph)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
def test_a_jit_trace_calls_the_blocks():
    segment, x = stage_and_map()
    expected = segment(x)
    traced = torch.jit.trace(segment, x, check_trace=False)
    assert [name for name, _ in traced.named_children()] == ["0", "1", "2"]
    assert "conv_bn_add_relu_packed" in str(dict(traced.named_children())["1"].inlined_graph)
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("first", ["called before", "not called before"])
def test_compile_and_export(first):
    frozen, x = network(), x_of()
    if first == "called before":
        frozen(x)
    exported = torch.export.export(frozen, (x,))
    # What runs without a gradient is a graph inside the graph.
    graphs = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("fused_resnet_export.run_program" in target for target in targets) == 1
    assert not frozen._frozen_derived.values, "nothing is derived from fake tensors"
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


def test_copies_derive_anew():
    segment, x = stage_and_map()
    y = segment(x)
    for other in (copy.deepcopy(segment), pickle.loads(pickle.dumps(segment))):
        assert isinstance(other, Lowered)
        assert not other._frozen_derived.values
        assert torch.equal(other(x), y)
        other[1].conv1.scale.mul_(2)
        assert not torch.equal(other(x), y)
        assert torch.equal(segment(x), y)


def test_a_replica_runs_its_own_blocks():
    """A replica of ``nn.DataParallel``, of a segment that has been called."""
    segment, x = stage_and_map()
    y = segment(x)
    replica = segment._replicate_for_data_parallel()
    del replica[1]
    assert torch.equal(replica(x), segment[2](segment[0](x)))
    assert torch.equal(segment(x), y)


def test_two_threads_at_once():
    """One segment, two threads, changing sizes; one of them makes it derive everything anew."""
    segment, _ = stage_and_map()
    maps = [image(n, 16, size, size, dtype=torch.float32) for n, size in ((1, 16), (3, 9), (2, 5))]
    expected = [segment(x) for x in maps]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(60):
            at = (first + i) % len(maps)
            if not torch.equal(segment(maps[at]), expected[at]):
                wrong.append(at)
            if first:
                segment.changed()

    in_threads(work, 0, 1)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_a_scripted_child_is_called():
    """Its children and tensors are not in dictionaries."""
    model = randomize(fr.resnet18(num_classes=10)).eval()
    x = image(5, 3, 64, 64, dtype=torch.float32)
    expected = fr.freeze(model)(x)
    model.fc = torch.jit.script(model.fc)
    torch.testing.assert_close(fr.freeze(model)(x), expected, rtol=1e-6, atol=1e-6)
