"""Random small networks from the pieces that people use: eager, fused and frozen agree.

A network is code: lines drawn from a table, each of which reads results of earlier ones. Seeds are
fixed, so every run draws the same networks.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import assert_same, image, randomize, results
from torch import nn
from traced_modules import BlurPool, DropPath

import fused_resnet as fr

CHANNELS = 4


def norm_with_activation() -> nn.Module:
    """timm's, if timm is installed."""
    try:
        from timm.layers import BatchNormAct2d
    except ImportError:
        return nn.BatchNorm2d(CHANNELS)
    return BatchNormAct2d(CHANNELS)


def frozen_norm() -> nn.Module:
    """torchvision's, if torchvision is installed."""
    try:
        from torchvision.ops.misc import FrozenBatchNorm2d
    except ImportError:
        return nn.BatchNorm2d(CHANNELS)
    return FrozenBatchNorm2d(CHANNELS)


CONVS = (
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=2),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding="same"),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"),
)
NORMS = (
    lambda: nn.BatchNorm2d(CHANNELS),
    lambda: nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=None),
    lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    lambda: nn.GroupNorm(2, CHANNELS),
    norm_with_activation,
    frozen_norm,
)
MIDDLES = (
    nn.Identity,
    lambda: nn.Dropout(0.0),
    lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)),
    lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)),
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: DropPath(0.5),
    BlurPool,
)
#: What the two children of each kind are drawn from.
KINDS = (CONVS, CONVS, NORMS, NORMS, MIDDLES, MIDDLES)

#: ``{a}`` and ``{b}`` are earlier results; ``{c}``, ``{n}`` and ``{m}`` number the children.
LINES = (
    "self.norm{n}(self.conv{c}({a}))",
    "self.relu(self.norm{n}(self.conv{c}({a})))",
    "F.relu(self.norm{n}(self.conv{c}({a})) + {b})",
    "self.relu({b} + self.norm{n}(self.conv{c}({a})))",
    "torch.relu(self.norm{n}({a}))",
    "self.norm{n}(self.relu(self.conv{c}({a})))",
    "self.conv{c}({a})",
    "self.norm{n}({a})",
    "self.mid{m}({a})",
    "self.mid{m}(self.norm{n}(self.conv{c}({a})))",
    "{a} + {b}",
    "0.5 * {a} + {b}",
    "{a}.relu()",
    "{a} * {a}.mean((2, 3), keepdim=True).sigmoid()",
    "{a}.add({b}).relu()",
    "self.relu({a} * 1)",
)
#: In-place statements on a new result, which autograd allows.
STATEMENTS = (
    "{v} = self.norm{n}(self.conv{c}({a})); {v} += {b}",
    "{v} = self.norm{n}(self.conv{c}({a})); {v} += {b}; {v} = F.relu({v}, inplace=True)",
    "{v} = {a} * 1; {v} += self.norm{n}(self.conv{c}({b}))",
)


@st.composite
def programs(draw) -> tuple[tuple[int, ...], tuple[str, ...], int]:
    kinds = tuple(draw(st.integers(0, len(pieces) - 1)) for pieces in KINDS)
    lines: list[str] = []
    for index in range(draw(st.integers(1, 7))):
        earlier = st.sampled_from(["x", *(f"v{i}" for i in range(index))])
        names = {key: draw(st.integers(0, 1)) for key in "cnm"}
        names |= {"a": draw(earlier), "b": draw(earlier), "v": f"v{index}"}
        text = draw(st.sampled_from([*LINES, *STATEMENTS]))
        if text not in STATEMENTS:
            text = f"{{v}} = {text}"
        lines.append(text.format(**names))
    return kinds, tuple(lines), draw(st.integers(0, 3))


def build(program: tuple[tuple[int, ...], tuple[str, ...], int]) -> nn.Module:
    kinds, lines, seed = program
    body = "".join(f"        {line}\n" for line in lines)
    kept = [f"v{i}" for i in range(len(lines))][-2:]
    source = (
        "class Network(nn.Module):\n    def forward(self, x):\n"
        f"{body}        return torch.cat([{', '.join(kept)}], 1)\n"
    )
    namespace = {"nn": nn, "torch": torch, "F": F}
    exec(source, namespace)
    model = namespace["Network"]()
    torch.manual_seed(seed)
    for i in range(2):
        model.add_module(f"conv{i}", CONVS[kinds[i]]())
        model.add_module(f"norm{i}", NORMS[kinds[2 + i]]())
        model.add_module(f"mid{i}", MIDDLES[kinds[4 + i]]())
    model.relu = nn.ReLU(inplace=bool(seed % 2))
    return randomize(model, seed=seed + 1).double().eval()


def agree(program: tuple[tuple[int, ...], tuple[str, ...], int]) -> None:
    model, x = build(program), image(2, CHANNELS, 6, 5)
    fused = fr.fuse(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fr.freeze(model)(x), expected, rtol=1e-9, atol=1e-9)
    for step, mode in enumerate((False, True, True)):
        try:
            torch.manual_seed(step)  # for drop-path
            truth = results(model.train(mode), x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            return  # PyTorch itself has no gradient here
        torch.manual_seed(step)
        assert_same(results(fused.train(mode), x), truth)


FEW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@FEW
@given(programs())
def test_random_networks(program) -> None:
    agree(program)


@pytest.mark.slow
@settings(FEW, max_examples=2000)
@given(programs())
def test_many_random_networks(program) -> None:
    agree(program)
