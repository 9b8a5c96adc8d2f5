"""Shortcuts that subsample and pad with channels of zeros, in blocks of any code (option A)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from training_blocks import X, assert_one_unit, assert_trains_the_same, pair, state

import fused_resnet as fr


def subsampled(x: Tensor) -> Tensor:
    """A shortcut that can be pickled."""
    return x[:, :, ::2, ::2]


#: Of 8 channels, in the words of several repositories.
SHORTCUTS = {
    "both": (12, 2, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)),
    "value by keyword": (12, 2, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), value=0.0)),
    "stride of 3": (12, 3, lambda x: F.pad(x[:, :, ::3, ::3], (0, 0, 0, 0, 2, 2))),
    "zeros alone": (12, 1, lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))),
    "subsampling alone": (8, 2, subsampled),
}

#: Near misses of the same shapes, which are other functions.
OTHERS = {
    "ones": (12, 2, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 1)),
    "zeros on one side": (12, 2, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 0))),
    "some channels": (12, 2, lambda x: F.pad(x[:, 2:6, ::2, ::2], (0, 0, 0, 0, 4, 4))),
    "from the second row": (12, 3, lambda x: F.pad(x[:, :, 1::3, ::3], (0, 0, 0, 0, 2, 2))),
    "a factor": (12, 2, lambda x: 2 * F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))),
}


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    """A basic block of 8 channels with any shortcut."""

    def __init__(self, k: int, stride: int, shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, k, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(k)
        self.shortcut = Lambda(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def block(case) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Block(*case)).double().train()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_block_is_one_operation(shortcut) -> None:
    assert_one_unit(assert_trains_the_same(block(SHORTCUTS[shortcut])))


@pytest.mark.parametrize("shortcut", OTHERS)
def test_a_near_miss_is_not(shortcut) -> None:
    assert fr.report(assert_trains_the_same(block(OTHERS[shortcut]))).blocks == []


def test_another_stride_to_each_side_is_not() -> None:
    other = block((12, (2, 1), lambda x: F.pad(x[:, :, ::2, :], (0, 0, 0, 0, 2, 2))))
    assert fr.report(assert_trains_the_same(other)).blocks == []


def test_a_block_that_returns_its_shortcut_too_is_not() -> None:
    class Both(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            side = self.shortcut(x)
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + side), side

    torch.manual_seed(0)
    eager, fused = pair(randomize(Both(*SHORTCUTS["both"])).double().train())
    for found, expected in zip(fused(image(*X)), eager(image(*X)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert fr.report(fused).blocks == []


def test_an_input_that_needs_no_gradient() -> None:
    eager, fused = pair(block(SHORTCUTS["both"]))
    x = image(*X).requires_grad_(False)
    for model in (eager, fused):
        model(x).square().sum().backward()
    found, expected = state(fused), state(eager)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_a_copy_and_a_pickle_of_it() -> None:
    """The generated forward goes with its module."""
    eager, fused = pair(block(SHORTCUTS["subsampling alone"]))
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    assert_one_unit(again)
    assert_same(results(again, image(*X)), results(eager, image(*X)))
