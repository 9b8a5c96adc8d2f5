"""A frozen model refuses every change inside it, in one line that says what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import image, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_resnet as fr

CHANGE = (
    r"this model is frozen for inference; change the model that freeze\(\) was given and freeze"
)
HOOK = (
    r"this model is frozen for inference; register the hook on the frozen model itself, or before"
)


class Lists(nn.Module):
    """The containers of PyTorch, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fr.nn.Stem(3, 16)
        self.stage = nn.Sequential(*(fr.nn.BasicBlock(16, 16) for _ in range(3)))
        self.list = nn.ModuleList([nn.ReLU(), nn.Sigmoid()])
        self.dict = nn.ModuleDict({"a": nn.Tanh()})
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.head = nn.Linear(16, 5)
        self.register_buffer("factor", torch.ones(()))
        self.settings = {"a": 1}
        self.flag = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.dict["a"](self.stage(self.stem(x)))
        for module in self.list:
            x = module(x)
        return self.head(x.mean((2, 3))) * self.factor * self.parameters_[0]


@pytest.fixture
def frozen() -> nn.Module:
    torch.manual_seed(0)
    return fr.freeze(randomize(Lists()).eval())


def x_of(batch: int = 2) -> Tensor:
    return image(batch, 3, 16, 16, dtype=torch.float32)


def set_class(module: nn.Module) -> None:
    module.__class__ = nn.Identity


def item(owner: Any, index: Any, value: Any = None) -> None:
    if value is None:
        del owner[index]
    else:
        owner[index] = value


BLOCK = "stage.1"
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a child of the model": lambda m: setattr(m, "stem", nn.Identity()),
    "a child to None": lambda m: setattr(m.stage[1], "downsample", None),
    "a child of a block": lambda m: setattr(m.stage[1], "relu", nn.ReLU6()),
    "a new child": lambda m: setattr(m.stage[1], "other", nn.ReLU6()),
    "an attribute": lambda m: setattr(m.stage[1], "stride", 2),
    "an attribute of the model": lambda m: setattr(m, "flag", True),
    "a new attribute": lambda m: setattr(m.stage, "flag", True),
    "a setting of a convolution": lambda m: setattr(m.stage[1].conv1, "stride", (2, 2)),
    "a tensor": lambda m: setattr(m.stage[1].conv1, "scale", torch.ones(16)),
    "a parameter": lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(5, 16))),
    "forward of the model": lambda m: setattr(m, "forward", torch.relu),
    "forward of a block": lambda m: setattr(m.stage[1], "forward", torch.relu),
    "forward of a convolution": lambda m: setattr(m.stage[1].conv1, "forward", torch.relu),
    "the mode": lambda m: setattr(m.stage[1], "training", True),
    "a class": lambda m: set_class(m.stage[1]),
    "compile in place": lambda m: m.stage[1].compile(backend="eager"),
    "memory without contents": lambda m: m.to_empty(device="cpu"),
    "memory without contents of a stage": lambda m: m.stage.to_empty(device="cpu"),
    "delete a child": lambda m: delattr(m, "stem"),
    "delete an attribute": lambda m: delattr(m.stage[1], "stride"),
    "delete a buffer": lambda m: delattr(m, "factor"),
    "add_module": lambda m: m.stage.add_module("3", nn.ReLU()),
    "register_module": lambda m: m.stage[0].register_module("other", nn.ReLU()),
    "register_buffer": lambda m: m.stage[0].register_buffer("other", torch.ones(1)),
    "register_parameter": lambda m: m.register_parameter("other", nn.Parameter(torch.ones(1))),
    "set_submodule": lambda m: m.set_submodule(BLOCK, nn.Identity()),
    "set_submodule of a stage": lambda m: m.stage.set_submodule("1", nn.Identity()),
    "item of a sequence": lambda m: item(m.stage, 1, nn.Identity()),
    "delete an item of a sequence": lambda m: item(m.stage, 1),
    "delete a slice": lambda m: item(m.stage, slice(1, None)),
    "append": lambda m: m.stage.append(nn.ReLU()),
    "insert": lambda m: m.stage.insert(0, nn.ReLU()),
    "extend": lambda m: m.stage.extend(nn.Sequential(nn.ReLU())),
    "pop": lambda m: m.stage.pop(1),
    "in-place addition": lambda m: m.stage.__iadd__(nn.Sequential(nn.ReLU())),
    "item of a list": lambda m: item(m.list, 0, nn.Identity()),
    "delete an item of a list": lambda m: item(m.list, 0),
    "append to a list": lambda m: m.list.append(nn.ReLU()),
    "insert into a list": lambda m: m.list.insert(0, nn.ReLU()),
    "extend a list": lambda m: m.list.extend([nn.ReLU()]),
    "pop from a list": lambda m: m.list.pop(0),
    "item of a dict": lambda m: item(m.dict, "a", nn.Identity()),
    "delete an item of a dict": lambda m: item(m.dict, "a"),
    "pop from a dict": lambda m: m.dict.pop("a"),
    "clear a dict": lambda m: m.dict.clear(),
    "update a dict": lambda m: m.dict.update({"b": nn.ReLU()}),
    "item of a parameter list": lambda m: m.parameters_.append(nn.Parameter(torch.ones(1))),
    "the dictionary of children": lambda m: m._modules.pop("stem"),
    "a parametrisation": lambda m: parametrizations.weight_norm(m.head),
    "pruning": lambda m: prune.l1_unstructured(m.head, "weight", 0.5),
    "pruning of a convolution": lambda m: prune.random_unstructured(
        m.stage[1].conv1, "weight", 0.5
    ),
    "weight_norm as a hook": lambda m: torch.nn.utils.weight_norm(m.head),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_refused_and_leave_the_model_intact(frozen: nn.Module, change: str) -> None:
    x = x_of()
    before = frozen(x)
    names = [name for name, _ in frozen.named_modules()]
    with pytest.raises(RuntimeError, match=CHANGE) as raised:
        CHANGES[change](frozen)
    assert "\n" not in str(raised.value)
    assert [name for name, _ in frozen.named_modules()] == names
    assert torch.equal(frozen(x), before)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_inside_are_refused(frozen: nn.Module, kind: str) -> None:
    for module in frozen.modules():
        if module is not frozen:
            with pytest.raises(RuntimeError, match=rf"{kind}\(\): {HOOK}"):
                getattr(module, kind)(lambda *_: None)


def test_hooks_of_the_frozen_model_run(frozen: nn.Module) -> None:
    x, seen = x_of(), []
    expected = frozen(x)
    handles = [
        frozen.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        frozen.register_forward_hook(lambda module, args, y: seen.append(y)),
        frozen.register_full_backward_hook(lambda *_: None),
    ]
    doubled = frozen(x)
    assert torch.equal(seen[0], doubled)
    for handle in handles:
        handle.remove()
    assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x * 2), doubled)


def test_hooks_from_before_run_and_stay() -> None:
    torch.manual_seed(0)
    model, x, seen = randomize(Lists()).eval(), x_of(), []
    model.stage[1].register_forward_hook(lambda module, args, y: y * 2)
    model.stage[2].conv1.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        expected = model(x)
    seen.clear()
    frozen = fr.freeze(model)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_inner_modules_have_their_paths_and_can_be_called(frozen: nn.Module) -> None:
    x = x_of()
    h = frozen.stem(x)
    for block in frozen.stage:
        h = block(h)
    assert torch.equal(h, frozen.stage(frozen.stem(x)))
    assert torch.equal(
        frozen.stage[:2](frozen.stem(x)), frozen.stage[1](frozen.stage[0](frozen.stem(x)))
    )
    assert frozen.get_submodule("stage.1.conv1") is frozen.stage[1].conv1


def test_a_slice_of_a_frozen_sequence_can_be_changed() -> None:
    torch.manual_seed(0)
    blocks = [fr.nn.BasicBlock(8, 8) for _ in range(3)]
    frozen = fr.freeze(randomize(nn.Sequential(*blocks)).eval())
    x = image(2, 8, 9, 9, dtype=torch.float32)
    part = frozen[:2]
    assert torch.equal(part(x), frozen[1](frozen[0](x)))
    part.append(nn.Sigmoid())
    assert torch.equal(part(x), frozen[1](frozen[0](x)).sigmoid())
    assert len(frozen) == 3


class Remembers(nn.Module):
    """Keeps results in attributes, as torchvision's AnchorGenerator does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.last: Any = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.last = [tuple(x.shape)]
        self.calls = self.calls + 1
        return self.body(x) * self.calls


def test_a_forward_may_keep_results_in_attributes() -> None:
    frozen, x = fr.freeze(randomize(Remembers()).eval()), x_of()
    first, second = frozen(x), frozen(x)
    torch.testing.assert_close(second, 2 * first)
    assert frozen.last == [(2, 3, 16, 16)]
    with pytest.raises(RuntimeError, match=CHANGE):
        frozen.last = None


# What replaces tensors goes on working


@pytest.mark.parametrize("assign", [False, True])
def test_loading_has_an_effect_on_the_model_and_on_a_part(frozen: nn.Module, assign: bool) -> None:
    x = x_of()
    before = frozen(x)
    other = fr.freeze(randomize(Lists(), seed=5).eval())
    assert not torch.equal(other(x), before)
    other.load_state_dict(frozen.state_dict(), assign=assign)
    assert torch.equal(other(x), before)
    conv = frozen.stage[1].conv2
    state = conv.state_dict()
    conv.load_state_dict({**state, "weight": state["weight"] * 2}, assign=assign)
    assert not torch.equal(frozen(x), before)
    conv.load_state_dict(state, assign=assign)
    assert torch.equal(frozen(x), before)


def test_tensors_changed_in_place_have_an_effect(frozen: nn.Module) -> None:
    x = x_of()
    before = frozen(x)
    frozen.stage[1].conv2.scale.mul_(2)
    after = frozen(x)
    assert not torch.equal(after, before)
    h = frozen.stem(x)
    for block in frozen.stage:
        h = block(h)
    assert torch.equal(frozen.stage(frozen.stem(x)), h)
    frozen.head.weight.data = torch.zeros_like(frozen.head.weight)
    assert torch.equal(frozen(x), frozen.head.bias.expand(2, 5))


def columns_first(weight: Tensor) -> Tensor:
    """The same matrix in another memory order."""
    return weight.detach().t().contiguous().t()


class Head(nn.Module):
    """A stem and a head, which are one program."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = fr.nn.Stem(3, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


@pytest.mark.parametrize("assign", [False, True])
def test_a_matrix_that_is_not_contiguous_is_read_as_it_is_now(assign: bool) -> None:
    """By a program's layer: the bits of PyTorch's own depend on the order in memory."""
    model, x = randomize(Head(), seed=3).eval(), x_of()
    model.head.weight = nn.Parameter(columns_first(model.head.weight))
    frozen = fr.freeze(model)
    assert frozen.head.weight.is_contiguous(), "else each call would copy it and plan anew"
    before = frozen(x)
    torch.testing.assert_close(before, model(x))
    with torch.no_grad():
        model.head.weight.mul_(2)
    state = frozen.state_dict()
    state["head.weight"] = columns_first(state["head.weight"] * 2)
    frozen.load_state_dict(state, assign=assign)
    doubled = frozen(x)
    torch.testing.assert_close(doubled, model(x))
    frozen.head.weight.data = columns_first(frozen.head.weight)
    assert torch.equal(frozen(x), doubled)
    frozen.head.weight.mul_(0.5)
    assert torch.equal(frozen(x), before)


def test_functional_call(frozen: nn.Module) -> None:
    x = x_of()
    before = frozen(x)
    scale = "stage.1.conv2.scale"
    given = {scale: frozen.get_buffer(scale) * 2, "head.bias": frozen.head.bias + 1}
    changed = torch.func.functional_call(frozen, given, x)
    assert torch.equal(frozen(x), before)
    with torch.no_grad():
        frozen.stage[1].conv2.scale.mul_(2)
        frozen.head.bias.add_(1)
    assert torch.equal(frozen(x), changed)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_refuse_too_and_share_nothing(frozen: nn.Module, how: str) -> None:
    x = x_of()
    before = frozen(x)
    if how == "deepcopy":
        other = copy.deepcopy(frozen)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(frozen))
    else:
        torch.save(frozen, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), before)
    for change in ("a child of a block", "append", "an attribute"):
        with pytest.raises(RuntimeError, match=CHANGE):
            CHANGES[change](other)
    with pytest.raises(RuntimeError, match=HOOK):
        other.stage[0].register_forward_hook(lambda *_: None)
    other.stage[1].conv2.scale.mul_(2)
    assert not torch.equal(other(x), before)
    assert torch.equal(frozen(x), before)


def test_memory_can_be_shared_and_the_format_changed(frozen: nn.Module) -> None:
    x = x_of()
    before = frozen(x)
    frozen.share_memory().to(memory_format=torch.channels_last).float().cpu()
    assert torch.equal(frozen(x), before)
    assert frozen.stage[1].conv1.packed.is_shared()


def test_a_replica_can_be_changed(frozen: nn.Module) -> None:
    """``nn.DataParallel`` sets the tensors and the children of its replicas."""
    x = x_of()
    before = frozen(x)
    replica = frozen._replicate_for_data_parallel()
    for name, child in frozen.named_children():
        setattr(replica, name, child)
    for name, parameter in frozen.named_parameters(recurse=False):
        setattr(replica, name, parameter)
    assert torch.equal(replica(x), before)
    replica.stem = nn.Sequential(frozen.stem, nn.ReLU())
    assert torch.equal(frozen(x), before)


# Other processes and tracers


def _answers(rank: int, model: nn.Module, x: Tensor, expected: Tensor) -> None:
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_goes_to_processes(frozen: nn.Module, method: str) -> None:
    """The unpacked weights are temporary: they must live until the process has started."""
    x = x_of()
    torch.multiprocessing.start_processes(
        _answers, (frozen, x, frozen(x)), nprocs=1, start_method=method
    )


class Images(torch.utils.data.Dataset):
    """Images that a frozen model transforms."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.model(x_of(1))[0]


@pytest.mark.thorough
def test_a_data_loader_takes_it(frozen: nn.Module) -> None:
    loader = torch.utils.data.DataLoader(
        Images(frozen), batch_size=2, num_workers=1, multiprocessing_context="spawn"
    )
    torch.testing.assert_close(next(iter(loader)), frozen(x_of(1)).expand(2, -1))


@pytest.mark.parametrize("kind", ["network", "part", "larger"])
def test_symbolic_trace(frozen: nn.Module, kind: str) -> None:
    x = x_of()
    root = {
        "network": frozen,
        "part": frozen.stage,
        "larger": nn.Sequential(OrderedDict(a=nn.Identity(), frozen=frozen)),
    }[kind]
    given = frozen.stem(x) if kind == "part" else x
    traced = torch.fx.symbolic_trace(root)
    assert "conv1" in " ".join(str(n.target) for n in traced.graph.nodes)
    torch.testing.assert_close(traced(given), root(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_model_without_parameters_takes_any_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
    x = image(1, 3, 8, 8, dtype=dtype)
    y = fr.freeze(model)(x)
    assert y.dtype is dtype
    assert torch.equal(y, model(x))
    assert fr.freeze(model, torch.float32)(x.float()).dtype is torch.float32
