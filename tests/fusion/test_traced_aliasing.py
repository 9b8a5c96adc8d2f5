"""In-place writes, views and shared modules around the operations of a group."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from torch import Tensor, nn

import fused_resnet as fr


def ready(model: nn.Module) -> nn.Module:
    """The model with random weights and statistics, equal at every call; float64, eval mode."""
    g = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.4
    return randomize(model).double().eval()


class Pieces(nn.Module):
    """Two convolutions, two batch norms, an in-place ReLU, and a child that writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))


class ChildWritesInput(Pieces):
    """The shortcut's in-place ReLU changes what the convolution has already read."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn1(self.conv1(x))
        return self.act(y + self.head(x))


class FunctionWritesInput(Pieces):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn1(self.conv1(x))
        z = torch.relu_(x)
        return self.act(y + z)


class ViewWritesInput(Pieces):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn1(self.conv1(x))
        x[:, :2].mul_(3)
        return self.act(y + x)


class ResidualWritten(Pieces):
    """The residual changes between the addition and the activation."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 1
        y = self.bn1(self.conv1(x)) + kept
        kept.mul_(2)
        return self.act(y) + kept


class AddsIntoTheOther(Pieces):
    """The sum is written to the shortcut, which is returned as well."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv2(x)
        kept = shortcut.view(shortcut.shape)
        shortcut += self.bn1(self.conv1(x))
        return self.act(shortcut) + kept


class ResultKept(Pieces):
    """The batch norm's result is changed in place by the ReLU, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = self.act(y)
        return self.conv2(z) + y


class ViewKept(Pieces):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        view = y[:, :2]
        return torch.cat([self.act(y), view], 1)


class SumKept(Pieces):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y += x
        return self.act(y) + y


class NextChildWrites(Pieces):
    """The head's in-place ReLU changes what the first group returned and the sum reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        z = self.head(y)
        return z + y


class SharedBatchNorm(Pieces):
    """One batch norm on both sides of an addition: the order of its updates counts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv1(x)) + self.bn1(self.conv2(x)))


class SharedAllAround(Pieces):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn1(self.conv1(y)) + y)
        return self.act(self.bn2(self.conv1(y)) + x)


class PartAssigned(Pieces):
    """A part of what the convolution has read is assigned to."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn1(self.conv1(x))
        x[:, 1:3] = 2.5
        return self.act(y + x)


class Holds(Pieces):
    """The convolution's input is put into a list, and written to through the list."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        kept = xs[1] * 1
        xs[0] = kept
        y = self.bn1(self.conv1(kept))
        xs[0].mul_(3)
        return self.act(y) + xs[1]


class Puts(nn.Module):
    """Puts its second argument into its first."""

    def forward(self, xs: list[Tensor], x: Tensor) -> None:
        xs[0] = x


class HoldsByChild(Pieces):
    """The same, by a child that gets the list as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.puts = Puts()

    def forward(self, xs: list[Tensor]) -> Tensor:
        kept = xs[1] * 1
        self.puts(xs, kept)
        y = self.bn1(self.conv1(kept))
        xs[0].mul_(3)
        return self.act(y) + xs[1]


class ListHolds(nn.Module):
    """Calls one of them with a list of its own, and reads the list afterwards."""

    inner_class: type[nn.Module] = Holds

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.inner_class()

    def forward(self, x: Tensor) -> Tensor:
        xs = [x * 2, x]
        return self.inner(xs) + xs[0]


class ListHoldsByChild(ListHolds):
    inner_class = HoldsByChild


CASES = [
    ChildWritesInput,
    FunctionWritesInput,
    ViewWritesInput,
    ResidualWritten,
    AddsIntoTheOther,
    ResultKept,
    ViewKept,
    SumKept,
    NextChildWrites,
    SharedBatchNorm,
    SharedAllAround,
    PartAssigned,
    ListHolds,
    ListHoldsByChild,
]


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Without gradients where PyTorch raises: some of these write to saved tensors."""
    try:
        return results(model, x)
    except RuntimeError:
        with torch.no_grad():
            found = {"y": model(x)}
        return found | {k: b.clone() for k, b in model.named_buffers()}


@pytest.mark.parametrize("cls", CASES, ids=lambda c: c.__name__)
def test_every_reader_sees_the_same_values(cls: type[nn.Module]) -> None:
    model, x = ready(cls()), image(2, 4, 9, 7)
    fused, frozen = fr.fuse(model), fr.freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
    fused = fr.fuse(copy.deepcopy(model))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fused.train()(x), model.train()(x), rtol=1e-9, atol=1e-9)
        expected, got = outcome(model, x), outcome(fused, x)
        if got.keys() == expected.keys():
            assert_same(got, expected)
    torch.testing.assert_close(fused.state_dict(), model.state_dict(), rtol=1e-9, atol=1e-9)


def test_in_place_at_the_head_of_the_next_child_across_modules() -> None:
    """A block's result is kept by its parent and overwritten by the next block's first ReLU."""

    class Block(Pieces):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.head(x))) + x

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            kept = self.first(x * 1)
            return self.second(kept) + kept

    model, x = ready(Parent()), image(2, 4, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(fr.fuse(model)(x), model(x))
        torch.testing.assert_close(fr.freeze(model)(x), model(x))
    assert len(fr.report(fr.fuse(model)).fused) == 2


class Shared(nn.Module):
    """One block with two parents, neither of which inlines it."""

    def __init__(self) -> None:
        super().__init__()
        unit = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.a, self.b = nn.Module(), nn.Module()
        self.unit, self.again = unit, unit

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.unit(x) + x)
        return self.again(y) + F.relu(self.again(x))


def test_a_sequential_in_two_places() -> None:
    model, x = ready(Shared()), image(2, 4, 9, 7)
    fused = fr.fuse(copy.deepcopy(model))
    torch.testing.assert_close(fr.freeze(model)(x), model(x))
    assert_same(results(fused, x), results(model, x))
    assert_same(results(fused.train(), x), results(model.train(), x))


def test_a_frozen_child_called_by_itself_gives_the_same_result() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(4),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + x)

    model, x = ready(Block()), image(2, 4, 9, 7)
    frozen = fr.freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
        torch.testing.assert_close(frozen.body(x), model.body(x))
    assert fr.report(frozen).fused == fr.report(fr.fuse(model)).fused
