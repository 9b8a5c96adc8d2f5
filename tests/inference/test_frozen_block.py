"""A frozen block runs as one operation, unless its modules are changed or observed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import image, in_threads, randomize
from operator_calls import OperatorCalls
from torch import nn

import fused_resnet as fr
from fused_resnet.inference.run_steps import separate_operations
from fused_resnet.inference.step_blocks import blocks_of
from fused_resnet.ops.program_steps import decode


def network(depth: int = 18) -> nn.Module:
    torch.manual_seed(0)
    return randomize(getattr(fr, f"resnet{depth}")(num_classes=10)).eval()


@pytest.fixture
def calls():
    """Grows by one at each call of the operation."""
    with OperatorCalls("fused_resnet::residual_block".__eq__) as ran:
        yield ran.names


def x_of(batch: int = 1, size: int = 64) -> torch.Tensor:
    return image(batch, 3, size, size, dtype=torch.float32)


@pytest.mark.parametrize(("depth", "blocks"), [(18, 8), (50, 16)])
def test_every_block_is_one_operation(calls, depth, blocks):
    frozen, x = fr.freeze(network(depth)), x_of()
    y = frozen(x)
    assert len(calls) == blocks
    with torch.no_grad():
        torch.testing.assert_close(y, network(depth)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [({"shortcut": "A"}, 9), ({"shortcut": "B"}, 9), ({"residual": False}, 0)],
    ids=str,
)
def test_blocks_for_small_images(calls, settings, blocks):
    """All nine blocks, whether the shortcut has parameters or not; none without a shortcut."""
    model, x = randomize(fr.cifar_resnet(20, **settings)).eval(), x_of(2, 32)
    y = fr.freeze(model)(x)
    assert len(calls) == blocks
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_a_disabled_shortcut_is_not_computed(calls):
    model, x = randomize(fr.cifar_resnet(20)).eval(), x_of(2, 32)
    model.layer2[1].residual = False
    y = fr.freeze(model)(x)
    assert len(calls) == 8
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [18, 50])
def test_the_network_equals_its_separate_convolutions(calls, dtype, depth):
    frozen, x = fr.freeze(network(depth), dtype), x_of(3)
    y = frozen(x)
    calls.clear()
    with separate_operations():
        torch.testing.assert_close(y, frozen(x), rtol=1e-6, atol=1e-6)
    assert not calls


@pytest.mark.parametrize("depth", [18, 50])
def test_a_loaded_weight_has_an_effect(depth):
    """The truth is the block's own forward, which reads its modules at every call."""
    frozen, x = fr.freeze(network(depth)), x_of()
    before = frozen(x)
    conv = frozen.layer2[0].conv1
    state = conv.state_dict()
    conv.load_state_dict({**state, "weight": state["weight"] * 2})
    after = frozen(x)
    assert not torch.equal(after, before)
    with separate_operations():
        torch.testing.assert_close(after, frozen(x), rtol=1e-5, atol=1e-5)


def test_global_hooks_see_the_convolutions():
    frozen, x, seen = fr.freeze(network()), x_of(), []
    frozen(x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        frozen(x)
    finally:
        handle.remove()
    assert frozen.layer3[1].conv2 in seen


def test_copies_have_their_own_weights():
    frozen, x = fr.freeze(network()), x_of()
    y = frozen(x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        other.conv1.scale.mul_(2)
        other.layer1[0].conv1.load_state_dict(
            {k: v * 2 for k, v in frozen.layer1[0].conv1.state_dict().items()}
        )
        assert not torch.equal(other(x), y)
        assert torch.equal(frozen(x), y)


def test_a_replica_runs_its_own_modules():
    """A replica of ``nn.DataParallel``, of a block that has been called."""
    block = fr.freeze(network()).layer1[0]
    x = image(2, 64, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = block(x)
        replica = block._replicate_for_data_parallel()
        replica.conv2 = copy.deepcopy(block.conv2)
        replica.conv2.scale.zero_()
        replica.conv2.shift.zero_()
        assert torch.equal(replica(x), x.relu())
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("depth", [18, 50])
def test_compile_and_export(depth):
    frozen, x = fr.freeze(network(depth)), x_of(2)
    expected = frozen(x)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(frozen, (x,))
    graphs = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    (program,) = (node for node in nodes if "run_program" in str(node.target))
    found = set(blocks_of(decode(program.args[2])).values())
    assert len(found) == {18: 8, 50: 16}[depth]
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-5, atol=1e-5)


def test_two_threads_at_once():
    """One model, two Python threads, changing image and batch sizes: the same bits."""
    frozen = fr.freeze(network())
    inputs = [x_of(batch, size) for batch, size in ((1, 64), (3, 96), (2, 33), (5, 64))]
    expected = [frozen(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(20):
            at = (first + i) % len(inputs)
            if not torch.equal(frozen(inputs[at]), expected[at]):
                wrong.append(at)

    in_threads(work, 0, 2)
    assert not wrong
