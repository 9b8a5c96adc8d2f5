"""Which calls of a frozen model are captured in a CUDA graph and replayed: the policy alone.

The recorder works on the CPU; tests/gpu/test_gpu_graphs.py has the tests on a device.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import normal
from graph_recorder import Recorder
from networks import randomize
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference import cuda_graphs as policy
from fused_resnet.inference.cuda_graphs import Graphs, size_for


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(fr.resnet18(num_classes=5)).eval()


@pytest.fixture
def frozen(network) -> nn.Module:
    model = fr.freeze(network)
    model.cuda_graphs = Graphs(2, Recorder())
    return model


def images(batch: int = 1, seed: int = 0, size: int = 32) -> Tensor:
    torch.manual_seed(seed)
    return normal(batch, 3, size, size, dtype=torch.float32)


def used(model: nn.Module, *calls: Tensor) -> tuple[int, int]:
    """Numbers of captured and replayed calls; checks each result against that without graphs."""
    recorder = model.cuda_graphs._recorder
    before = len(recorder.recorded), recorder.replays
    for x in calls:
        size, model.cuda_graphs.size = model.cuda_graphs.size, 0
        expected = model(x)
        model.cuda_graphs.size = size
        assert torch.equal(model(x), expected)
    return len(recorder.recorded) - before[0], recorder.replays - before[1]


# Captures


def test_the_second_call_of_a_shape_is_captured_and_later_ones_replayed(frozen):
    assert used(frozen, images()) == (0, 0)
    assert used(frozen, images(seed=1)) == (1, 1)
    assert used(frozen, images(seed=2), images(seed=3)) == (0, 2)


def test_a_shape_has_a_graph_of_its_own(frozen):
    assert used(frozen, images(1), images(2), images(1, size=64), images(1)) == (1, 1)
    assert used(frozen, images(2), images(1), images(2)) == (1, 3)


def test_an_input_in_another_layout_or_dtype_shares_the_graph(network):
    frozen = fr.freeze(network, torch.bfloat16)
    frozen.cuda_graphs = Graphs(2, Recorder())
    x = images()
    assert used(frozen, x, x, x.contiguous(memory_format=torch.channels_last)) == (1, 2)
    assert used(frozen, x.bfloat16()) == (0, 1)
    assert frozen(x).dtype is torch.float32
    assert frozen(x.bfloat16()).dtype is torch.bfloat16


def test_the_least_recently_used_is_evicted(frozen):
    a, b, c = images(1), images(2), images(3)
    assert used(frozen, a, a, b, b, a) == (2, 3)
    assert used(frozen, c, c) == (1, 1)  # in the place of b
    assert set(frozen.cuda_graphs.memory) == {"1x3x32x32 float32", "3x3x32x32 float32"}
    assert used(frozen, a, c) == (0, 2)
    assert frozen.cuda_graphs._recorder.waits == 1, "the device may still be in it"


def test_more_shapes_than_graphs_are_captured_less_and_less_often(frozen):
    rounds = [images(n) for n in (1, 2, 3)]
    recorder = frozen.cuda_graphs._recorder
    for _ in range(40):
        for x in rounds:
            frozen(x)
    assert len(recorder.recorded) < 20


def test_a_smaller_size_is_respected(frozen):
    a, b = images(1), images(2)
    used(frozen, a, a, b, b)
    assert len(frozen.cuda_graphs) == 2
    frozen.cuda_graphs.size = 1
    used(frozen, images(3), images(3))
    assert len(frozen.cuda_graphs) == 1


# Results


def test_a_result_is_a_copy(frozen):
    first, second = images(seed=1), images(seed=2)
    frozen(first)
    one = frozen(first)
    kept = one.clone()
    two = frozen(second)
    assert one.data_ptr() != two.data_ptr()
    assert torch.equal(one, kept)


def test_a_result_is_overwritten_with_reuse_outputs(frozen):
    frozen.cuda_graphs.reuse_outputs = True
    frozen(images())
    one, two = frozen(images(seed=1)), frozen(images(seed=2))
    assert one.data_ptr() == two.data_ptr()


def test_any_mode_of_gradients_and_back(frozen):
    x = images()
    with torch.inference_mode():
        frozen(x)
        assert frozen(x).is_inference()
    y = frozen(x)
    assert not y.is_inference()
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(frozen(x.clone()), y)
    assert frozen.cuda_graphs._recorder.replays == 3


def test_other_outputs_than_one_tensor(network):
    class Features(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            y = self.body(x)
            return {"out": y, "size": 3}

    frozen = fr.freeze(Features(network), graphs=2)
    recorder = Recorder()

    def capture(forward, x):
        graph = Recorder.capture(recorder, lambda static: forward(static)["out"], x)
        graph.output = {"out": graph.output, "size": 3}
        return graph

    recorder.capture = capture  # type: ignore[method-assign]
    frozen.cuda_graphs = Graphs(2, recorder)
    x = images()
    expected = frozen(x)
    for _ in range(2):
        answer = frozen(x)
        assert answer["size"] == 3
        assert torch.equal(answer["out"], expected["out"])
    assert answer["out"].data_ptr() != frozen(x)["out"].data_ptr()
    assert recorder.replays == 3


# Calls that are not captured


def never(frozen: nn.Module, call: Callable[[], Any]) -> None:
    """``call`` is neither captured nor replayed, before there is a graph and after."""
    recorder = frozen.cuda_graphs._recorder
    for _ in range(2):
        before = len(recorder.recorded), recorder.replays
        for _ in range(3):
            call()
        assert (len(recorder.recorded), recorder.replays) == before
        used(frozen, images(), images())  # a graph of the same shape
        assert len(frozen.cuda_graphs) == 1


def test_not_where_the_recorder_cannot(frozen):
    """On the CPU, or while the caller captures a graph."""

    def call():
        frozen.cuda_graphs._recorder.taken = False
        frozen(images())
        frozen.cuda_graphs._recorder.taken = True

    never(frozen, call)


def test_the_real_recorder_takes_nothing_on_a_cpu(network):
    frozen = fr.freeze(network)
    x = images()
    expected = frozen(x)
    for _ in range(3):
        assert torch.equal(frozen(x), expected)
    assert len(frozen.cuda_graphs) == 0


class Map(Tensor):
    """A tensor subclass."""


def test_not_for_other_inputs(frozen):
    never(frozen, lambda: frozen(images().as_subclass(Map)))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(images())
    never(frozen, lambda: frozen(x))


def test_not_with_more_than_one_argument(frozen):
    class Two(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    two = fr.freeze(Two(), graphs=2)
    two.cuda_graphs = Graphs(2, recorder := Recorder())
    for _ in range(3):
        two(images(), scale=2.0)
        two(images(), 2.0)
    assert not recorder.recorded
    two(x=images())
    two(images())
    two(images(), 1.0)
    assert (len(recorder.recorded), recorder.replays) == (1, 2), "these are the same call"


def test_not_with_a_hook_inside(network):
    model = copy.deepcopy(network)
    seen = []
    model.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    frozen = fr.freeze(model)
    frozen.cuda_graphs = Graphs(2, recorder := Recorder())
    for _ in range(3):
        frozen(images())
    assert len(seen) == 3
    assert not recorder.recorded


def test_not_with_a_global_hook(frozen):
    def call():
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        frozen(images())
        handle.remove()

    never(frozen, call)


def test_a_hook_of_the_model_itself_runs_around_the_graph(frozen):
    seen = []
    frozen.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert used(frozen, images(), images()) == (1, 1)
    assert len(seen) == 4


def test_not_in_a_mode_or_under_a_transform(frozen):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def watched():
        with Watch():
            frozen(images())

    never(frozen, watched)

    class WatchFunctions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def functions_watched():
        with WatchFunctions():
            frozen(images())

    never(frozen, functions_watched)


def test_not_while_it_is_traced(frozen):
    never(frozen, lambda: torch.jit.trace(frozen, images(), check_trace=False))


def test_not_under_a_compiler(frozen):
    torch._dynamo.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="eager")
    never(frozen, lambda: compiled(images()))
    never(frozen, lambda: torch.export.export(frozen, (images(),)))
    torch._dynamo.reset()


def test_another_setting_is_another_graph(frozen):
    x = images()
    used(frozen, x, x)
    with fr.use_backend("reference"):
        assert used(frozen, x) == (0, 0)
        assert used(frozen, x) == (1, 1)
    assert used(frozen, x) == (0, 1)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not before
    try:
        assert used(frozen, x) == (0, 0)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_changed_model_drops_its_graphs(frozen, network):
    """New weights have other addresses, and a graph would read the old ones."""
    x = images()
    used(frozen, x, x)
    torch.manual_seed(7)
    other = fr.freeze(randomize(fr.resnet18(num_classes=5)).eval())
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen(x), other(x))
    assert len(frozen.cuda_graphs) == 0
    used(frozen, x, x)
    frozen.fc.weight.data = torch.zeros_like(frozen.fc.weight)
    assert used(frozen, x) == (0, 0)


def test_a_forward_that_cannot_be_captured_runs_without_a_graph(frozen):
    frozen.cuda_graphs._recorder.fails = True
    x = images()
    frozen(x)
    with pytest.warns(UserWarning, match="no CUDA graph for 1x3x32x32 float32.* not permitted"):
        frozen(x)
    frozen.cuda_graphs._recorder.fails = False
    assert used(frozen, x, x, x) == (0, 0), "it is not tried again"
    assert used(frozen, images(2), images(2)) == (1, 1)


# Settings, copies, threads


def test_number_of_graphs(network):
    assert fr.freeze(network).cuda_graphs.size == policy.SIZE
    assert fr.freeze(network, graphs=True).cuda_graphs.size == policy.SIZE
    assert fr.freeze(network, graphs=3).cuda_graphs.size == 3
    for none in (0, False):
        frozen = fr.freeze(network, graphs=none)
        frozen.cuda_graphs = Graphs(frozen.cuda_graphs.size, Recorder())
        assert used(frozen, images(), images()) == (0, 0)


def test_an_unknown_forward_is_not_captured_by_default(network):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = network, 0

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    assert fr.freeze(Own()).cuda_graphs.size == 0
    assert fr.freeze(Own(), graphs=2).cuda_graphs.size == 2
    assert size_for(nn.Sequential(network), None) == policy.SIZE


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_begin_without_graphs(network, duplicate):
    frozen = fr.freeze(network, graphs=2)
    frozen.cuda_graphs.reuse_outputs = True
    x = images()
    expected = frozen(x)
    other = duplicate(frozen)
    assert other.cuda_graphs is not frozen.cuda_graphs
    assert len(other.cuda_graphs) == 0
    assert (other.cuda_graphs.size, other.cuda_graphs.reuse_outputs) == (2, True)
    assert torch.equal(other(x), expected)


def test_the_report_shows_their_memory(frozen):
    assert "CUDA graphs" not in fr.report(frozen).summary()
    used(frozen, images(), images())
    assert fr.report(frozen).graphs == {"1x3x32x32 float32": 3 * 2**20}
    assert str(fr.report(frozen)).endswith("CUDA graphs: 1x3x32x32 float32 (3.0 MiB)")
    shown = "1 of at most 2 CUDA graphs: 1x3x32x32 float32 (3.0 MiB)"
    assert str(frozen.cuda_graphs) == shown
    frozen.cuda_graphs.clear()
    assert str(frozen.cuda_graphs) == "0 of at most 2 CUDA graphs"


def test_threads_get_their_own_results(frozen):
    given = [images(seed=seed) for seed in range(4)]
    expected = [frozen(x) for x in given]
    wrong = []

    def run(x: Tensor, answer: Tensor) -> None:
        for _ in range(5):
            if not torch.equal(frozen(x), answer):
                wrong.append(x)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(given, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert frozen.cuda_graphs._recorder.replays >= 20
